"""Checks of the train step on one GPU; each prints one JSON line and exits with 1 if it fails.

    python experiments/benchmarks/gpu_checks.py golden --golden DIR
    python experiments/benchmarks/gpu_checks.py attention
    python experiments/benchmarks/gpu_checks.py resume --folder DIR

`golden` compares losses and gradients with the reference's; `attention` compares the platform's attention with the
dense mask; `resume` trains 20 steps, and called again repeats the last 10 of them and compares the bits of the state.
`--platform cpu` runs the same checks on a CPU, where cuDNN's masks are computed by XLA. Needs what `step_time.py`
needs, and safetensors for golden tensors.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from aimv2_jax.cli import Parser, split_overrides  # noqa: E402
from aimv2_jax.errors import EXIT_BUG, EXIT_FINISHED, UserError, cli_main  # noqa: E402
from experiments.benchmarks.step_time import PLATFORMS, PRESETS, Trainer, preset_config, start_platform  # noqa: E402

# Rows, prefix and valid rows of two examples, and the mask: the encoder's, the decoder's and a teacher's.
ATTENTION_CASES = (
    (256, (1, 255), (256, 256), "prefix"),
    (258, (100, 257), (257, 123), "prefix"),
    (334, (0, 0), (333, 290), "causal"),
    (1024, (1024, 1024), (1024, 700), "full"),
    (4096, (1500, 4000), (4096, 4000), "prefix"),
)
HEADS, HEAD_DIM = 2, 128
# Relative to the largest entry. bfloat16 has eight bits; the reference is float32 with the same inputs.
ATTENTION_TOLERANCE = 2e-2
GOLDEN_TOLERANCE = {"loss": 5e-6, "gradient": 2e-5}  # As tests/test_golden.py.
STEPS, RESUMED_AFTER = 20, 10


def check_golden(folder: Path) -> dict[str, Any]:
    """Largest relative errors of losses and gradients in float32, against the reference's tensors."""
    import jax
    import jax.numpy as jnp

    from aimv2_jax.train.step import accumulate
    from tests.helpers.golden_names import paths
    from tests.helpers.golden_pretrain import Pretrain, read_json

    pretrain = Pretrain(folder / "pretrain")
    task, prefix = pretrain.task("loop", "none"), jnp.asarray(pretrain.prefix)
    counts = task.counts(pretrain.batch, prefix)
    run = jax.jit(partial(accumulate, task=task, microbatches=1))
    sums, grads = run(pretrain.params, pretrain.batch, prefix, counts)
    expected = read_json(pretrain.directory / "losses.json")
    losses = [float(sums[name] / counts[name]) / expected[f"{name}_loss"] - 1 for name in ("image", "text")]
    ours, theirs = paths(grads), pretrain.ours("grads.safetensors")
    errors = {path: largest_error(ours[path], theirs[path]) for path in theirs}
    worst = {"loss": max(map(abs, losses)), "gradient": max(errors.values())}
    return {"errors": worst, "passed": all(worst[name] <= GOLDEN_TOLERANCE[name] for name in worst)}


def largest_error(ours: Any, theirs: Any) -> float:
    """Largest difference, relative to the largest entry of `theirs`."""
    ours, theirs = np.asarray(ours, np.float32), np.asarray(theirs, np.float32)
    return float(np.abs(ours - theirs).max() / np.abs(theirs).max())


def check_attention(platform: str, cases: Sequence[tuple] = ATTENTION_CASES) -> dict[str, Any]:
    """Largest errors of output and gradients in bfloat16, against float32 attention with the dense mask."""
    from aimv2_jax.models.attention import choose_attention

    chosen = choose_attention("auto" if platform == "gpu" else "cudnn", HEAD_DIM, platform, "bfloat16")
    worst = {}
    for case in cases:
        ours, reference = attention_results(chosen, "bfloat16", *case), attention_results("xla", "float32", *case)
        errors = [largest_error(*pair) for pair in zip(ours, reference, strict=True)]
        worst[f"{case[-1]} {case[0]}"] = max(errors)
    passed = chosen != "xla" and all(error <= ATTENTION_TOLERANCE for error in worst.values())
    return {"implementation": chosen, "errors": worst, "passed": passed}


def attention_results(
    implementation: Any, dtype: str, rows: int, prefix: Sequence[int], counts: Sequence[int], kind: Any
) -> Any:
    """Output and gradients of q, k and v, which are the same bfloat16 numbers in every dtype; valid rows only."""
    import jax
    import jax.numpy as jnp

    from aimv2_jax.models.attention import MaskSpec, attend

    valid = jnp.arange(rows) < jnp.asarray(counts)[:, None]
    mask_spec = MaskSpec(jnp.asarray(prefix, jnp.int32), valid, kind=kind)
    shape = (2, rows, HEADS * HEAD_DIM)
    *qkv, weight = (jax.random.normal(jax.random.key(i), shape).astype("bfloat16") for i in range(4))

    def loss(q, k, v):
        out = jnp.where(valid[..., None], attend(q, k, v, mask_spec, None, HEADS, implementation), 0)
        return jnp.sum(out.astype(jnp.float32) * weight), out

    grads, out = jax.jit(jax.grad(loss, (0, 1, 2), has_aux=True))(*(x.astype(dtype) for x in qkv))
    return jax.device_get((out, *grads))


def check_resume(config: Any, folder: Path) -> dict[str, Any]:
    """Trains 20 steps and keeps the state after 10; called again, repeats the last 10 and compares the bits."""
    import jax

    folder.mkdir(parents=True, exist_ok=True)
    jax.config.update("jax_compilation_cache_dir", str(folder / "compiled"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    trainer = Trainer(config)
    leaves, tree = jax.tree.flatten(trainer.state)
    saved, record = folder / "state.npz", folder / "first.json"
    resumed = record.is_file()
    if resumed:
        with np.load(saved) as arrays:
            values = [arrays[str(i)] for i in range(len(leaves))]
        placed = [jax.device_put(value, leaf.sharding) for value, leaf in zip(values, leaves, strict=True)]
        trainer.state = jax.tree.unflatten(tree, placed)
    for step in range(RESUMED_AFTER if resumed else 0, STEPS):
        if step == RESUMED_AFTER and not resumed:
            host = jax.device_get(jax.tree.leaves(trainer.state))
            np.savez(saved, **{str(i): leaf for i, leaf in enumerate(host)})
        metrics = trainer.train()
    digest = hashlib.sha256()
    for leaf in jax.device_get(jax.tree.leaves(trainer.state)):
        digest.update(np.ascontiguousarray(leaf).tobytes())
    line = {"sha256": digest.hexdigest(), "loss": float(metrics["loss"]), "resumed": resumed, "passed": True}
    if resumed:
        first = json.loads(record.read_text())
        return line | {"passed": line["sha256"] == first["sha256"], "loss_of_first": first["loss"]}
    record.write_text(json.dumps(line))
    return line


@cli_main
def main(arguments: Sequence[str] | None = None) -> int:
    parser = Parser(description=__doc__.split("\n")[0])
    parser.add_argument("check", choices=["golden", "attention", "resume"])
    parser.add_argument("--platform", choices=sorted(PLATFORMS), default="gpu")
    parser.add_argument("--json", metavar="FILE", help="also write the line to this file")
    parser.add_argument("--golden", metavar="DIR", help="folder of the reference's tensors")
    parser.add_argument("--folder", metavar="DIR", help="folder for the state of `resume`")
    parser.add_argument("--preset", default="base_224", choices=sorted(PRESETS), help="model of `resume`")
    rest, overrides = split_overrides(sys.argv[1:] if arguments is None else arguments)
    flags = parser.parse_args(rest)
    for check, flag in (("golden", "golden"), ("resume", "folder")):
        if flags.check == check and not getattr(flags, flag):
            raise UserError(f"the check {check} needs --{flag}", getattr(flags, flag), "Give a folder")
    config = preset_config(flags.preset, overrides) if flags.check == "resume" else None
    start_platform(flags.platform)
    if flags.check == "golden":
        line = check_golden(Path(flags.golden))
    elif flags.check == "attention":
        line = check_attention(flags.platform)
    else:
        line = check_resume(config, Path(flags.folder))
    text = json.dumps(line)
    print(text)
    if flags.json:
        Path(flags.json).parent.mkdir(parents=True, exist_ok=True)
        Path(flags.json).write_text(text + "\n")
    return EXIT_FINISHED if line["passed"] else EXIT_BUG


if __name__ == "__main__":
    sys.exit(main())
