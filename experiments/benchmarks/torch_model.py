"""The model of pre-training in plain PyTorch, and its optimizer. B batch, L patches, P pixels a patch, T text tokens.

Attention is `scaled_dot_product_attention`; AdamLH is AdamW, whose decay is divided by the peak of the learning rate.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from aimv2_jax.config.schema import Config
from aimv2_jax.models.sizes import swiglu_hidden


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
