"""Times the same train step in plain PyTorch, compiled, in bfloat16: what `step_time.py` is compared with.

    python experiments/benchmarks/step_torch.py --preset large_224 --device cuda --batch 64 --json FILE
    python experiments/benchmarks/step_torch.py --golden DIR  # compares with the reference's tensors

Prints one JSON line. The model is that of the preset, with attention by `scaled_dot_product_attention`, mixed precision
by autocast over float32 parameters, and fused AdamW, whose decay by wd / peak is AdamLH's. B batch, L patches, T text,
D width. Without `--batch` the batch is the preset's; a batch that does not fit is halved until it does.
Needs torch, numpy and ml_collections, for the golden tensors also safetensors; no jax.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from aimv2_jax.cli import Parser, positive  # noqa: E402
from aimv2_jax.config.schema import Config  # noqa: E402
from aimv2_jax.errors import EXIT_FINISHED, UserError, cli_main  # noqa: E402
from experiments.benchmarks.step_time import PRESETS, preset_config, synthetic_arrays  # noqa: E402
from experiments.benchmarks.torch_golden import check_golden  # noqa: E402
from experiments.benchmarks.torch_model import build, optimizer  # noqa: E402


def measure(config: Config, device: str, steps: int, rounds: int, compiled: bool) -> dict[str, Any]:
    """Times steps of the config's batch; returns the rate, the memory and the last loss."""
    arrays = synthetic_arrays(config)
    patches, tokens = (torch.from_numpy(arrays[name]).to(device) for name in ("patches", "tokens"))
    before = np.roll(arrays["token_valid"], 1, axis=1)
    before[:, 0] = True
    text_mask = torch.from_numpy(arrays["token_valid"] | before).to(device)
    model = build(config).to(device)
    settings = config.optimizer
    adam = optimizer(model, settings.start_lr, settings.peak_lr, settings.betas, settings.eps, settings.weight_decay)
    run = torch.compile(model) if compiled else model
    bfloat16 = config.model.compute_dtype == "bfloat16"

    def step():
        prefix = torch.randint(1, config.num_patches, (len(tokens),), device=device)
        with torch.autocast(device, torch.bfloat16, enabled=bfloat16):
            loss = run(patches, tokens.long(), text_mask, prefix)[0]
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), settings.clip_norm)
        adam.step()
        adam.zero_grad(set_to_none=True)
        return loss

    start = time.perf_counter()
    step(), step()
    synchronise(device)
    compile_s = time.perf_counter() - start
    step_s = [seconds(step, steps, device) for _ in range(rounds)]
    return {
        "images_per_s": len(tokens) / statistics.median(step_s),
        "step_s": [round(value, 5) for value in step_s],
        "memory_gib": round(torch.cuda.max_memory_allocated() / 2**30, 3) if device == "cuda" else None,
        "compile_s": round(compile_s, 1),
        "loss": float(step()),
        "batch": len(tokens),
        "parameters": sum(p.numel() for p in model.parameters()),
        "torch": torch.__version__,
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
    }


def synchronise(device: str) -> None:
    """Waits for the device."""
    if device == "cuda":
        torch.cuda.synchronize()


def seconds(run: Callable[[], Any], repeats: int, device: str) -> float:
    """Mean time of `repeats` calls."""
    start = time.perf_counter()
    for _ in range(repeats):
        run()
    synchronise(device)
    return (time.perf_counter() - start) / repeats


@cli_main
def main(arguments: Sequence[str] | None = None) -> int:
    parser = Parser(description=__doc__.split("\n")[0])
    parser.add_argument("--json", metavar="FILE", help="also write the line to this file")
    parser.add_argument("--preset", default="reference", choices=sorted(PRESETS))
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--batch", type=positive, metavar="N", help="examples a step (default: the preset's)")
    parser.add_argument("--rounds", type=positive, default=5, help="the median of so many rounds is reported")
    parser.add_argument("--steps", type=positive, default=3, help="steps a round")
    parser.add_argument("--eager", action="store_true", help="do not compile")
    parser.add_argument("--golden", metavar="DIR", help="compare with the reference's tensors instead")
    flags = parser.parse_args(arguments)
    if flags.device == "cuda" and not torch.cuda.is_available():
        raise UserError("no NVIDIA GPU was found", "--device cuda", "Give --device cpu")
    if flags.golden:
        line: dict[str, Any] = {"largest_errors": check_golden(Path(flags.golden), flags.device)}
    else:
        line = largest(flags)
    print(json.dumps(line))
    if flags.json:
        Path(flags.json).parent.mkdir(parents=True, exist_ok=True)
        Path(flags.json).write_text(json.dumps(line) + "\n")
    return EXIT_FINISHED


def largest(flags: Any) -> dict[str, Any]:
    """Measures at the asked batch, or at the first half of it that fits."""
    batch = flags.batch
    while True:
        config = preset_config(flags.preset, [("data.batch_size", str(batch))] if batch else [])
        try:
            return measure(config, flags.device, flags.steps, flags.rounds, not flags.eager)
        except torch.cuda.OutOfMemoryError:
            batch = config.data.batch_size // 2
            if not batch:
                raise
        torch.cuda.empty_cache()


if __name__ == "__main__":
    sys.exit(main())
