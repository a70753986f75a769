"""Patches pooled to one vector by a learned query. B batch, L patches, D width, H heads, E head dim."""

from __future__ import annotations

import jax.numpy as jnp
from einops import rearrange
from flax import linen as nn
from jaxtyping import Array, Bool, Float

from aimv2_jax.models.layers import xavier_uniform


class AttentionPool(nn.Module):
    """One query over all patches: keys and values without bias, the query as it is, no output matrix.

    RECIPE.md §11.
    """

    heads: int

    @nn.compact
    def __call__(self, features: Float[Array, "B L D"], valid: Bool[Array, "B L"]) -> Float[Array, "B D"]:
        width = features.shape[-1]
        query_D = self.param("query", nn.initializers.normal(0.02), (width,))
        key_BLHE, value_BLHE = (
            rearrange(
                nn.Dense(width, use_bias=False, kernel_init=xavier_uniform, name=name)(features),
                "b l (h e) -> b l h e",
                h=self.heads,
            )
            for name in ("key", "value")
        )
        query_HE = rearrange(query_D, "(h e) -> h e", h=self.heads) * (width // self.heads) ** -0.5
        logits = jnp.einsum("he,blhe->bhl", query_HE, key_BLHE)
        weights = nn.softmax(jnp.where(valid[:, None], logits, jnp.finfo(logits.dtype).min))
        return rearrange(jnp.einsum("bhl,blhe->bhe", weights, value_BLHE), "b h e -> b (h e)")


class PooledHead(nn.Module):
    """What Hugging Face and Apple put on an encoder with `use_head`: the pool, and a linear layer with bias."""

    heads: int

    @nn.compact
    def __call__(self, features: Float[Array, "B L D"], valid: Bool[Array, "B L"]) -> Float[Array, "B D"]:
        return nn.Dense(features.shape[-1], name="output")(AttentionPool(self.heads, name="pool")(features, valid))
