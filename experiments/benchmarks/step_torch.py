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
from torch.nn import functional as F

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from aimv2_jax.cli import Parser, positive  # noqa: E402
from aimv2_jax.config.schema import Config  # noqa: E402
from aimv2_jax.errors import EXIT_FINISHED, UserError, cli_main  # noqa: E402
from aimv2_jax.models.sizes import swiglu_hidden  # noqa: E402
from experiments.benchmarks.step_time import PRESETS, preset_config, synthetic_arrays  # noqa: E402
from experiments.benchmarks.torch_golden import check_golden  # noqa: E402


def wide(x: torch.Tensor) -> torch.Tensor:
    """In float32, or as it is where that is wider."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


class RMSNorm(nn.Module):
    """x / rms(x) in float32, times a gain."""

    def __init__(self, width: int, eps: float):
        super().__init__()
        self.eps, self.scale = eps, nn.Parameter(torch.ones(width))

    def forward(self, x):
        rows = wide(x)
        rows = rows * torch.rsqrt(rows.square().mean(-1, keepdim=True) + self.eps)
        return rows.to(x.dtype) * self.scale.to(x.dtype)


class Block(nn.Module):
    """x += attention(norm x); x += SwiGLU(norm x)."""

    def __init__(self, width: int, heads: int, hidden: int, eps: float):
        super().__init__()
        self.heads = heads
        self.norm_1, self.norm_2 = RMSNorm(width, eps), RMSNorm(width, eps)
        self.query, self.key, self.value, self.out = (nn.Linear(width, width, bias=False) for _ in range(4))
        self.gate, self.up = (nn.Linear(width, hidden, bias=False) for _ in range(2))
        self.down = nn.Linear(hidden, width, bias=False)

    def forward(self, x, mask):
        rows = self.norm_1(x)
        heads = (
            project(rows).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for project in (self.query, self.key, self.value)
        )
        attended = F.scaled_dot_product_attention(*heads, attn_mask=mask, is_causal=mask is None)
        x = x + self.out(attended.transpose(1, 2).flatten(2))
        rows = self.norm_2(x)
        return x + self.down(F.silu(self.gate(rows)) * self.up(rows))


class Trunk(nn.Module):
    """Blocks and a final norm; causal without a mask."""

    def __init__(self, width: int, depth: int, heads: int, hidden: int, eps: float):
        super().__init__()
        self.blocks = nn.ModuleList(Block(width, heads, hidden, eps) for _ in range(depth))
        self.norm = RMSNorm(width, eps)

    def forward(self, x, mask=None):
        for block in self.blocks:
            x = block(x, mask)
        return self.norm(x)


class AIMv2(nn.Module):
    """Encoder, joint decoder and both losses, at a fixed resolution."""

    def __init__(
        self,
        encoder: dict[str, int],
        decoder: dict[str, int],
        patches: int,
        pixels: int,
        vocab: int,
        text: int,
        eps: float,
        alpha: float,
        mean: Sequence[float],
        std: Sequence[float],
        target_eps: float,
    ):
        super().__init__()
        self.alpha, self.target_eps = alpha, target_eps
        self.register_buffer("mean", torch.tensor(mean, dtype=torch.float64).repeat(pixels // 3))
        self.register_buffer("std", torch.tensor(std, dtype=torch.float64).repeat(pixels // 3))
        self.patch_embed = nn.Linear(pixels, encoder["width"])
        self.patch_norm = RMSNorm(encoder["width"], eps)
        self.position = nn.Parameter(0.02 * torch.randn(patches, encoder["width"]))
        self.encoder = Trunk(**encoder, eps=eps)
        self.image_embed = nn.Linear(encoder["width"], decoder["width"])
        self.begin = nn.Parameter(0.02 * torch.randn(decoder["width"]))
        self.text_position = nn.Parameter(0.01 * torch.randn(text + 1, decoder["width"]))
        self.token_table = nn.Embedding(vocab, decoder["width"])
        nn.init.normal_(self.token_table.weight, std=0.02)
        self.decoder = Trunk(**decoder, eps=eps)
        self.pixel_head = nn.Linear(decoder["width"], pixels, bias=False)
        self.token_head = nn.Linear(decoder["width"], vocab, bias=False)

    def forward(self, patches, tokens, text_mask, prefix):
        """Returns total, image and text loss of uint8 patches [B L P] and tokens [B T], float32."""
        length = patches.shape[1]
        dtype = self.position.dtype
        pixels = (patches.to(dtype) / 255 - self.mean.to(dtype)) / self.std.to(dtype)
        index = torch.arange(length, device=patches.device)
        mask = (index[None, :] <= index[:, None]) | (index[None, None, :] < prefix[:, None, None])
        x = self.patch_norm(self.patch_embed(pixels))
        features = self.encoder(x + self.position.to(x.dtype), mask[:, None])
        image = self.image_embed(features)
        embedded = self.token_table(tokens[:, :-1])
        begin = self.begin.expand(len(tokens), 1, -1)
        rows = torch.cat([begin, embedded], dim=1) + self.text_position[: tokens.shape[1]]
        rows = self.decoder(torch.cat([image, rows.to(image.dtype)], dim=1))
        predicted = wide(self.pixel_head(rows[:, : length - 1]))
        logits = wide(self.token_head(rows[:, length:]))
        centred = pixels - pixels.mean(-1, keepdim=True)
        variance = centred.square().sum(-1, keepdim=True) / (pixels.shape[-1] - 1)
        targets = centred * torch.rsqrt(variance + self.target_eps)
        scored = index[None, 1:] >= prefix[:, None].clamp(min=1)
        errors = (predicted - targets[:, 1:]).square().mean(-1)
        image_loss = (errors * scored).sum() / scored.sum()
        entropies = F.cross_entropy(logits.flatten(0, 1), tokens.flatten(), reduction="none")
        text_loss = (entropies * text_mask.flatten()).sum() / text_mask.sum()
        return text_loss + self.alpha * image_loss, image_loss, text_loss


def build(config: Config) -> AIMv2:
    """The model of a config."""
    model = config.model

    def trunk(size):
        hidden = size.hidden or swiglu_hidden(size.width)
        return dict(width=size.width, depth=size.depth, heads=size.heads, hidden=hidden)

    return AIMv2(
        trunk(model.encoder),
        trunk(model.decoder),
        config.num_patches,
        config.patch_pixels,
        model.decoder.vocab_size,
        model.decoder.text_length,
        model.norm_eps,
        config.loss.alpha,
        model.pixel_mean,
        model.pixel_std,
        config.loss.target_eps,
    )


def optimizer(model: AIMv2, lr: float, peak_lr: float, betas: Sequence[float], eps: float, weight_decay: float) -> Any:
    """AdamLH: AdamW that decays matrices by weight_decay / peak_lr; vectors and position tables do not decay."""
    named = dict(model.named_parameters())
    kept = [p for name, p in named.items() if p.ndim > 1 and "position" not in name]
    rest = [p for name, p in named.items() if p.ndim == 1 or "position" in name]
    groups = [dict(params=kept, weight_decay=weight_decay / peak_lr), dict(params=rest, weight_decay=0.0)]
    on_gpu = next(model.parameters()).is_cuda
    return torch.optim.AdamW(groups, lr=lr, betas=tuple(betas), eps=eps, fused=on_gpu)


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
        line: dict[str, Any] = {"largest_errors": check_golden(Path(flags.golden), AIMv2, optimizer, flags.device)}
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
