"""Attention pooling with a learned query. B batch, L patches, D width, H heads, E head dim."""

from __future__ import annotations

import jax.numpy as jnp
from einops import rearrange
from flax import linen as nn
from jaxtyping import Array, Bool, Float

from aimv2_jax.models.layers import Linear, Precision, named, parameter, xavier_uniform
from aimv2_jax.models.precision import exact_products
from aimv2_jax.parallel import collectives

_QUERY_AXES = ("heads",)
_MATRIX_AXES = ("embed", "heads")


class AttentionPool(nn.Module):
    """Attention of one query over all patches: keys and values without bias, no query or output projection.

    RECIPE.md §11. The query is multiplied by the key matrix and the pooled patches by the value matrix: computing keys
    and values for all patches would need two more [B, L, D] arrays for the same result.
    """

    heads: int

    @nn.compact
    def __call__(self, features: Float[Array, "B L D"], valid: Bool[Array, "B L"]) -> Float[Array, "B D"]:
        width = features.shape[-1]
        query_D = parameter(self, "query", named(nn.initializers.normal(0.02), *_QUERY_AXES), (width,))
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
        kernel = parameter(self, "kernel", named(xavier_uniform, *_MATRIX_AXES), (features, self.width))
        return collectives.all_gather_weight(kernel, _MATRIX_AXES)


class PooledHead(nn.Module):
    """Head of Hugging Face and Apple encoders with `use_head`: attention pooling and a linear layer with bias.

    Computed in float32.
    """

    heads: int

    @nn.compact
    def __call__(self, features: Float[Array, "B L D"], valid: Bool[Array, "B L"]) -> Float[Array, "B D"]:
        features = features.astype(jnp.float32)
        output = Linear(
            features.shape[-1],
            ("attended", "output"),
            Precision(),
            kernel_init=nn.initializers.lecun_normal(),
            bias_init=nn.initializers.zeros,
            name="output",
        )
        with exact_products(features.dtype):
            return output(AttentionPool(self.heads, name="pool")(features, valid))
