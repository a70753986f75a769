"""Attention pooling with a learned query. B batch, L patches, D width, H heads, E head dim."""

from __future__ import annotations

import jax.numpy as jnp
from einops import rearrange
from flax import linen as nn
from jaxtyping import Array, Bool, Float

from aimv2_jax.models.layers import xavier_uniform
from aimv2_jax.models.precision import exact_products


class AttentionPool(nn.Module):
    """Attention of one query over all patches: keys and values without bias, no query or output projection.

    RECIPE.md §11. The query is multiplied by the key matrix and the pooled patches by the value matrix: computing keys
    and values for all patches would need two more [B, L, D] arrays for the same result.
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
    """Kernel of a linear layer, [in, out]."""

    width: int

    @nn.compact
    def __call__(self, features: int) -> Float[Array, "{features} {self.width}"]:
        return self.param("kernel", xavier_uniform, (features, self.width))


class PooledHead(nn.Module):
    """Head of Hugging Face and Apple encoders with `use_head`: attention pooling and a linear layer with bias."""

    heads: int

    @nn.compact
    def __call__(self, features: Float[Array, "B L D"], valid: Bool[Array, "B L"]) -> Float[Array, "B D"]:
        with exact_products(features.dtype):
            return nn.Dense(features.shape[-1], name="output")(AttentionPool(self.heads, name="pool")(features, valid))
