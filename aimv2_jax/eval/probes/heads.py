"""Probe heads that are trained on frozen features. B batch, L patches, D width, C classes."""

from __future__ import annotations

from flax import linen as nn
from jaxtyping import Array, Bool, Float

from aimv2_jax.models.layers import xavier_uniform
from aimv2_jax.models.pooling import AttentionPool


class AttentiveHead(nn.Module):
    """A learned query over all patches, and a linear layer (RECIPE.md §11)."""

    heads: int
    classes: int

    @nn.compact
    def __call__(self, features: Float[Array, "B L D"], valid: Bool[Array, "B L"]) -> Float[Array, "B C"]:
        pooled = AttentionPool(self.heads, name="pool")(features, valid)
        return nn.Dense(self.classes, kernel_init=xavier_uniform, name="classes")(pooled)


class LinearHead(nn.Module):
    """A linear layer on one feature vector an image (L = 1)."""

    classes: int

    @nn.compact
    def __call__(self, features: Float[Array, "B L D"], valid: Bool[Array, "B L"]) -> Float[Array, "B C"]:
        return nn.Dense(self.classes, kernel_init=xavier_uniform, name="classes")(features[:, 0])
