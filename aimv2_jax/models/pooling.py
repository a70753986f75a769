"""Patches pooled to one vector by a learned query. B batch, L patches, D width, H heads, E head dim."""

from __future__ import annotations

import jax.numpy as jnp
from einops import rearrange
from flax import linen as nn
from jaxtyping import Array, Bool, Float

from aimv2_jax.models.layers import xavier_uniform
from aimv2_jax.models.precision import exact_products


class AttentionPool(nn.Module):
    """One query over all patches: keys and values without bias, the query as it is, no output matrix.

    RECIPE.md §11. The query is taken through the keys' matrix, and the pooled patches through the values': keys and
    values of all patches would be two [B, L, D] more, for the same numbers.
    """

    heads: int

    @nn.compact
    def __call__(self, features: Float[Array, "B L D"], valid: Bool[Array, "B L"]) -> Float[Array, "B D"]:
        width = features.shape[-1]
        query_D = self.param("query", nn.initializers.normal(0.02), (width,))
        key_DHE, value_DHE = (
            rearrange(_Matrix(width, name=name)(width), "d (h e) -> d h e", h=self.heads) for name in ("key", "value")
        )
        query_HE = rearrange(query_D, "(h e) -> h e", h=self.heads) * (width // self.heads) ** -0.5
        logits_BHL = jnp.einsum("bld,dh->bhl", features, jnp.einsum("dhe,he->dh", key_DHE, query_HE))
        weights_BHL = nn.softmax(jnp.where(valid[:, None], logits_BHL, jnp.finfo(logits_BHL.dtype).min))
        pooled_BHD = jnp.einsum("bhl,bld->bhd", weights_BHL, features)
        return rearrange(jnp.einsum("bhd,dhe->bhe", pooled_BHD, value_DHE), "b h e -> b (h e)")


class _Matrix(nn.Module):
    """The kernel of a linear layer, [in, out]."""

    width: int

    @nn.compact
    def __call__(self, features: int) -> Float[Array, "{features} {self.width}"]:
        return self.param("kernel", xavier_uniform, (features, self.width))


class PooledHead(nn.Module):
    """What Hugging Face and Apple put on an encoder with `use_head`: the pool, and a linear layer with bias."""

    heads: int

    @nn.compact
    def __call__(self, features: Float[Array, "B L D"], valid: Bool[Array, "B L"]) -> Float[Array, "B D"]:
        with exact_products(features.dtype):
            return nn.Dense(features.shape[-1], name="output")(AttentionPool(self.heads, name="pool")(features, valid))
