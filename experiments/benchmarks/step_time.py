"""Times the train step (forward, backward, clip, update) on a synthetic batch on one chip, and its matmul rate.

    python experiments/benchmarks/step_time.py --json FILE [--preset reference] [--platform cpu|gpu|tpu]
    python experiments/benchmarks/step_time.py --platform gpu --preset large_224 [--config.model.remat=full]

Prints one JSON line. Presets: `reference` (the model on which the PyTorch reference trainer was timed), `tiny` (a test
of this program), and the pre-training runs, whose batches are for a pod: one chip gets the largest batch that fits,
found by trial, or that of `--batch`. `mfu` is the model's FLOPs (monitoring/flops.py) over the chip's dense bf16 peak.
Timings are noisy: compare `images_per_gflop`, the rate over the matmul rate of the same run.
Needs only jax, flax, optax, numpy, ml_collections, einops and jaxtyping.
"""

from __future__ import annotations

import ast
import dataclasses
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from aimv2_jax.allocator import keep_freed_memory  # noqa: E402
from aimv2_jax.cli import Parser, positive, split_overrides  # noqa: E402
from aimv2_jax.config.load import build_config  # noqa: E402
from aimv2_jax.config.schema import Config  # noqa: E402
from aimv2_jax.errors import EXIT_FINISHED, UserError, cli_main  # noqa: E402
from aimv2_jax.platforms import may_have_gpu, may_have_tpu  # noqa: E402
from experiments import base, pretrain  # noqa: E402

MOST_EXAMPLES = 8192  # Upper bound of the search for the largest batch.
GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Platform:
    """A platform: JAX's name, the side of its reference matmul, and a check whether it may be present."""

    jax_name: str
    matmul_side: int
    is_here: Callable[[], bool]
    what: str
    searches: bool  # Whether a batch that is too large fails; a CPU would swap.


PLATFORMS = {
    "cpu": Platform("cpu", 1024, lambda: True, "CPU", searches=False),
    "gpu": Platform("cuda", 8192, may_have_gpu, "NVIDIA GPU", searches=True),
    "tpu": Platform("tpu", 8192, may_have_tpu, "TPU", searches=True),
}


def reference() -> Any:
    """The small model on which the PyTorch reference trainer was timed."""
    config = base.get_config()
    config.model.encoder.update(width=384, depth=12, heads=6)
    config.model.decoder.update(width=256, depth=4, heads=4, vocab_size=8192, text_length=32)
    config.model.compute_dtype = "float32"
    config.data.update(image_size=112, batch_size=16)
    return config


def tiny() -> Any:
    """A model that compiles in seconds, to test this program; its speed is meaningless."""
    config = reference()
    config.model.encoder.update(width=32, depth=1, heads=2)
    config.model.decoder.update(width=32, depth=1, heads=2, vocab_size=64)
    config.data.batch_size = 2
    return config


PRETRAIN = {f"{size}_224": partial(pretrain.get_config, size) for size in pretrain.SIZES}
PRESETS = {"reference": reference, "tiny": tiny} | PRETRAIN


def preset_config(name: str, overrides: Sequence[tuple[str, str]] = ()) -> Config:
    """Returns the config of a preset, for one device and without data; overrides as on a command line."""
    config = PRESETS[name]()
    config.data.sources, config.data.mixture = {"synthetic": ""}, {"synthetic": {"alt": 1.0}}
    config.mesh.update(dict.fromkeys(config.mesh, 1))
    for key, text in overrides:
        try:
            config.update_from_flattened_dict({key: _value(text)})
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(f"--config.{key} cannot be set", text, "See the keys in experiments/base.py") from error
    return build_config(config.to_dict())


def _value(text: str) -> Any:
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def largest_batch(fits: Callable[[int], bool], first: int = 8, most: int = MOST_EXAMPLES) -> int:
    """Returns the largest batch that fits, to an eighth of it: doubles from `first` until one fails, then bisects.

    Raises:
      UserError: if not even `first` examples fit.
    """
    if not fits(first):
        raise UserError("not enough memory for the model", f"{first} examples", "Try --config.model.remat=full")
    good = first
    while 2 * good <= most and fits(2 * good):
        good *= 2
    if 2 * good > most:
        return good
    step = good // 2
    floor = max(first, good // 8)
    while step >= floor:
        if fits(good + step):
            good += step
        step //= 2
    return good


def is_out_of_memory(error: Exception) -> bool:
    """Whether XLA ran out of memory, at compilation or at run time."""
    return any(word in str(error) for word in ("RESOURCE_EXHAUSTED", "Out of memory", "out of memory"))


def synthetic_arrays(config: Config) -> dict[str, np.ndarray]:
    """Returns a batch of noise pixels and random tokens (captions of random length)."""
    random = np.random.default_rng(0)
    (size, length), (_, columns) = config.batch_shapes[0], config.grid
    text = config.model.decoder.text_length
    indices = np.arange(length)
    coords = np.stack([indices // columns, indices % columns], axis=-1)
    return {
        "patches": random.integers(0, 256, (size, length, config.patch_pixels), np.uint8),
        "coords": np.broadcast_to(coords, (size, length, 2)).astype(np.int32),
        "valid": np.ones((size, length), bool),
        "tokens": random.integers(0, config.model.decoder.vocab_size, (size, text), np.int32),
        "token_valid": np.arange(text) < random.integers(text // 4, text, (size, 1)),
        "example_index": np.stack([np.zeros(size), np.arange(size)], axis=1).astype(np.uint32),
    }


def synthetic_batch(program: Any) -> dict[str, Any]:
    """Puts `synthetic_arrays` on the devices of `program`."""
    import jax

    shapes = program.abstract_batch(program.config.batch_shapes[0])
    arrays = synthetic_arrays(program.config)
    return {name: jax.device_put(array, shapes[name].sharding) for name, array in arrays.items()}


def seconds(run: Callable[[], Any], repeats: int) -> float:
    """Returns the mean time of `repeats` calls, dispatched in sequence."""
    import jax

    start = time.perf_counter()
    for _ in range(repeats):
        result = run()
    jax.block_until_ready(result)
    return (time.perf_counter() - start) / repeats


class Trainer:
    """The train step of a config on the first device, compiled, with its state and one batch."""

    def __init__(self, config: Config):
        import jax

        from aimv2_jax.train.builder import build_setup

        self.program = build_setup(config, jax.devices()[:1])
        self.batch = synthetic_batch(self.program)
        start = time.perf_counter()
        self.step = self.program.compile_step(config.batch_shapes[0])
        self.compile_s = time.perf_counter() - start
        self.state = self.program.init()

    def train(self) -> Any:
        self.state, metrics = self.step(self.state, self.batch, self.program.rng)
        return metrics

    @property
    def memory_gib(self) -> float:
        """Peak memory of the compiled step: state, batch and temporaries."""
        memory = self.step.memory_analysis()
        used = memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
        return (used + memory.temp_size_in_bytes) / GIB


def fits(config: Config) -> bool:
    """Whether a step of this config runs in the device's memory."""
    import jax

    try:
        jax.block_until_ready(Trainer(config).train())
    except jax.errors.JaxRuntimeError as error:
        if not is_out_of_memory(error):
            raise
        return False
    return True


def measure(config: Config, rounds: int, steps: int, matmul_side: int) -> dict[str, Any]:
    """Alternates matmuls and steps for `rounds` rounds; returns medians and the model's cost."""
    import jax
    import jax.numpy as jnp

    from aimv2_jax.models.aimv2 import count_parameters
    from aimv2_jax.monitoring.flops import flops_per_example, model_flops_utilisation

    trainer = Trainer(config)
    dtype = jnp.dtype(config.model.compute_dtype)
    matrix = jax.random.normal(jax.random.key(0), (matmul_side, matmul_side), dtype)
    multiply = jax.jit(jnp.matmul).lower(matrix, matrix).compile()
    seconds(trainer.train, 1), seconds(lambda: multiply(matrix, matrix), 3)
    step_s, matmul_s = [], []
    for _ in range(rounds):
        matmul_s.append(seconds(lambda: multiply(matrix, matrix), 20))
        step_s.append(seconds(trainer.train, steps))
    gflop_per_s = 2 * matmul_side**3 / statistics.median(matmul_s) / 1e9
    images_per_s = config.data.batch_size / statistics.median(step_s)
    gflop_per_image = flops_per_example(config, config.batch_shapes[0].patches) / 1e9
    device = jax.devices()[0]
    limit = (device.memory_stats() or {}).get("bytes_limit")
    return {
        "images_per_s": images_per_s,
        "matmul_gflop_per_s": gflop_per_s,
        "images_per_gflop": images_per_s / gflop_per_s,
        "gflop_per_image": gflop_per_image,
        "fraction_of_matmul_rate": images_per_s * gflop_per_image / gflop_per_s,
        "mfu": model_flops_utilisation(config, images_per_s * gflop_per_image / 1e3, [device]),
        "memory_gib": round(trainer.memory_gib, 3),
        "memory_limit_gib": None if limit is None else round(limit / GIB, 3),
        "step_s": [round(value, 4) for value in step_s],
        "compile_s": trainer.compile_s,
        "parameters": count_parameters(trainer.program.abstract_state.params),
        "device": device.device_kind,
        "jax": jax.__version__,
    }


def take_turns(config: Config, steps: int) -> None:
    """Times `steps` steps for every line of stdin and prints their rate (for `beside.py`)."""
    trainer = Trainer(config)
    seconds(trainer.train, 1)
    for _ in sys.stdin:
        step_s = statistics.median(seconds(trainer.train, 1) for _ in range(steps))
        print(json.dumps({"images_per_s": config.data.batch_size / step_s}), flush=True)


def start_platform(name: str) -> None:
    """Binds JAX to the platform; raises `UserError` if it is absent."""
    platform = PLATFORMS[name]
    remedy = f"Use a machine that has one, with the extra {name} installed"
    if not platform.is_here():
        raise UserError(f"no {platform.what} was found", f"--platform {name}", remedy)
    os.environ["JAX_PLATFORMS"] = platform.jax_name
    keep_freed_memory()
    if name == "gpu":  # JAX's default is 0.75; the largest batch needs more.
        os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.95")
    import jax

    try:
        jax.devices()
    except (RuntimeError, AssertionError) as error:  # JAX asserts that a platform started.
        raise UserError(f"no {platform.what} could be started", str(error), remedy) from error


@cli_main
def main(arguments: Sequence[str] | None = None) -> int:
    parser = Parser(description=__doc__.split("\n")[0])
    parser.add_argument("--json", metavar="FILE", help="also write the line to this file")
    parser.add_argument("--preset", default="reference", choices=sorted(PRESETS))
    parser.add_argument("--platform", choices=sorted(PLATFORMS), default="cpu")
    parser.add_argument("--batch", type=positive, metavar="N", help="examples a step (default: the preset's)")
    parser.add_argument("--layers", choices=["scan", "loop"], help="how the blocks run (default: the preset's)")
    parser.add_argument(
        "--rounds", type=positive, default=5, help="alternations of matmuls and steps, of which the median is reported"
    )
    parser.add_argument("--steps", type=positive, default=3, help="steps a round")
    parser.add_argument("--turns", action="store_true", help="run a round for every line of stdin, for beside.py")
    rest, overrides = split_overrides(sys.argv[1:] if arguments is None else arguments)
    flags = parser.parse_args(rest)
    platform = PLATFORMS[flags.platform]
    if flags.layers:
        overrides.append(("model.layers", flags.layers))

    def config(batch: int | None) -> Config:
        return preset_config(flags.preset, overrides + ([("data.batch_size", str(batch))] if batch else []))

    config(flags.batch)  # Reports invalid settings before anything starts.
    batch, pods = flags.batch, flags.preset in PRETRAIN
    if batch is None and pods and not platform.searches:
        raise UserError(f"preset {flags.preset} has a batch for a pod", f"--platform {flags.platform}", "Give --batch")
    start_platform(flags.platform)
    if batch is None and pods:
        batch = largest_batch(lambda size: fits(config(size)))
    if flags.turns:
        take_turns(config(batch), flags.steps)
        return EXIT_FINISHED
    line = measure(config(batch), flags.rounds, flags.steps, platform.matmul_side)
    line |= {"preset": flags.preset, "platform": flags.platform, "batch": config(batch).data.batch_size}
    text = json.dumps(line)
    print(text)
    if flags.json:
        Path(flags.json).parent.mkdir(parents=True, exist_ok=True)
        Path(flags.json).write_text(text + "\n")
    return EXIT_FINISHED


if __name__ == "__main__":
    sys.exit(main())
