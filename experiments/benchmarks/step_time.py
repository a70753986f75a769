"""Times the train step (forward, backward, clip, update) on a synthetic batch, beside this machine's own matmul rate.

    python experiments/benchmarks/step_time.py --json FILE [--preset reference] [--platform cpu|gpu]

Prints one JSON line. Timings are noisy: compare `images_per_gflop`, the rate over the matmul rate of the same run.
Needs only jax, flax, optax, numpy, ml_collections, einops and jaxtyping.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from aimv2_jax.config import Config, build_config  # noqa: E402
from aimv2_jax.errors import UserError, reports_user_errors  # noqa: E402
from aimv2_jax.flags import Parser  # noqa: E402
from experiments import base  # noqa: E402

MATMUL_SIDE = 1024


def reference() -> Any:
    """The small model that the PyTorch reference trainer was timed with."""
    config = base.get_config()
    config.model.encoder.update(width=384, depth=12, heads=6)
    config.model.decoder.update(width=256, depth=4, heads=4, vocab_size=8192, text_length=32)
    config.model.compute_dtype = "float32"
    config.data.update(image_size=112, batch_size=16)
    return config


def tiny() -> Any:
    """A model that compiles in seconds: whether this program works, not how fast anything is."""
    config = reference()
    config.model.encoder.update(width=32, depth=1, heads=2)
    config.model.decoder.update(width=32, depth=1, heads=2, vocab_size=64)
    config.data.batch_size = 2
    return config


PRESETS = {"reference": reference, "tiny": tiny}


def preset_config(name: str, overrides: dict[str, Any]) -> Config:
    """The config of a preset, for one device and without any data."""
    config = PRESETS[name]()
    config.data.sources, config.data.mixture = {"synthetic": ""}, {"synthetic": {"alt": 1.0}}
    config.mesh.data = 1
    config.update_from_flattened_dict({key: value for key, value in overrides.items() if value is not None})
    return build_config(config.to_dict())


def synthetic_batch(program: Any) -> dict[str, Any]:
    """Noise for pixels, random tokens, captions of random length, on the program's devices."""
    import jax
    import numpy as np

    random = np.random.default_rng(0)
    shapes = program.abstract_batch
    size, text = shapes["tokens"].shape
    rows, columns = program.config.grid
    coords = np.stack(np.meshgrid(np.arange(rows), np.arange(columns), indexing="ij"), -1).reshape(-1, 2)
    batch = {
        "patches": random.integers(0, 256, shapes["patches"].shape, np.uint8),
        "coords": np.broadcast_to(coords, shapes["coords"].shape).astype(np.int32),
        "valid": np.ones(shapes["valid"].shape, bool),
        "tokens": random.integers(0, program.config.model.decoder.vocab_size, (size, text), np.int32),
        "token_valid": np.arange(text) < random.integers(text // 4, text, (size, 1)),
        "example_index": np.stack([np.zeros(size), np.arange(size)], axis=1).astype(np.uint32),
    }
    return {name: jax.device_put(array, shapes[name].sharding) for name, array in batch.items()}


def seconds(run: Callable[[], Any], repeats: int) -> float:
    """Mean time of `repeats` calls, dispatched one after another."""
    import jax

    start = time.perf_counter()
    for _ in range(repeats):
        result = run()
    jax.block_until_ready(result)
    return (time.perf_counter() - start) / repeats


def measure(config: Config, rounds: int, steps: int) -> dict[str, Any]:
    """Alternates matmuls and steps for `rounds` rounds; the medians, and the model's cost."""
    import jax
    import jax.numpy as jnp

    from aimv2_jax.models.aimv2 import count_parameters
    from aimv2_jax.train.flops import flops_per_example
    from aimv2_jax.train.program import build_program

    program = build_program(config, jax.devices()[:1])
    batch = synthetic_batch(program)
    start = time.perf_counter()
    step = program.compile_step()
    compile_s = time.perf_counter() - start
    state = program.init()

    def train() -> Any:
        nonlocal state
        state, metrics = step(state, batch, program.rng)
        return metrics

    dtype = jnp.dtype(config.model.compute_dtype)
    matrix = jax.random.normal(jax.random.key(0), (MATMUL_SIDE, MATMUL_SIDE), dtype)
    multiply = jax.jit(jnp.matmul).lower(matrix, matrix).compile()
    seconds(train, 1), seconds(lambda: multiply(matrix, matrix), 3)
    step_s, matmul_s = [], []
    for _ in range(rounds):
        matmul_s.append(seconds(lambda: multiply(matrix, matrix), 20))
        step_s.append(seconds(train, steps))
    gflop_per_s = 2 * MATMUL_SIDE**3 / statistics.median(matmul_s) / 1e9
    images_per_s = config.data.batch_size / statistics.median(step_s)
    gflop_per_image = flops_per_example(config) / 1e9
    return {
        "images_per_s": images_per_s,
        "matmul_gflop_per_s": gflop_per_s,
        "images_per_gflop": images_per_s / gflop_per_s,
        "gflop_per_image": gflop_per_image,
        "fraction_of_matmul_rate": images_per_s * gflop_per_image / gflop_per_s,
        "step_s": [round(value, 4) for value in step_s],
        "compile_s": compile_s,
        "parameters": count_parameters(program.abstract_state.params),
        "device": jax.devices()[0].device_kind,
        "jax": jax.__version__,
    }


@reports_user_errors
def main() -> int:
    parser = Parser(description=__doc__.split("\n")[0])
    parser.add_argument("--json", metavar="FILE", help="also write the line to this file")
    parser.add_argument("--preset", default="reference", choices=sorted(PRESETS))
    parser.add_argument("--platform", choices=["cpu", "gpu"], default="cpu")
    parser.add_argument("--batch", type=int, help="examples a step, instead of the preset's")
    parser.add_argument("--layers", choices=["scan", "loop"], help="how the blocks run, instead of the preset's")
    parser.add_argument("--rounds", type=int, default=5, help="alternations of matmuls and steps; the median counts")
    parser.add_argument("--steps", type=int, default=3, help="steps a round")
    flags = parser.parse_args()
    for name in ("rounds", "steps"):
        if getattr(flags, name) < 1:
            raise UserError(f"--{name} is too small", getattr(flags, name), "Give at least 1")
    os.environ["JAX_PLATFORMS"] = {"cpu": "cpu", "gpu": "cuda"}[flags.platform]
    config = preset_config(flags.preset, {"data.batch_size": flags.batch, "model.layers": flags.layers})
    line = measure(config, flags.rounds, flags.steps)
    line |= {"preset": flags.preset, "platform": flags.platform, "batch": config.data.batch_size}
    text = json.dumps(line)
    print(text)
    if flags.json:
        Path(flags.json).parent.mkdir(parents=True, exist_ok=True)
        Path(flags.json).write_text(text + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
