"""Who may read whom, and the attention that obeys. B batch, Q queries, K keys, S sequence, H heads, E head dim."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int


def full_mask(valid_BL: Bool[Array, "B L"]) -> Bool[Array, "B 1 1 L"]:
    """Every query reads every valid patch: inference and probes."""
    return valid_BL[:, None, None, :]


def prefix_mask(prefix_B: Int[Array, " B"], valid_BL: Bool[Array, "B L"]) -> Bool[Array, "B 1 L L"]:
    """Query i reads key j iff j <= i or j < prefix, and j is valid (RECIPE.md §2)."""
    index_L = jnp.arange(valid_BL.shape[1])
    causal_LL = index_L[None, :] <= index_L[:, None]
    in_prefix_BL = index_L[None, :] < prefix_B[:, None]
    return ((causal_LL | in_prefix_BL[:, None, :]) & valid_BL[:, None, :])[:, None]


def causal_mask(valid_BS: Bool[Array, "B S"]) -> Bool[Array, "B 1 S S"]:
    """Query i reads key j iff j <= i and j is valid."""
    index_S = jnp.arange(valid_BS.shape[1])
    return ((index_S[None, :] <= index_S[:, None]) & valid_BS[:, None, :])[:, None]


def attend(
    q_BQHE: Float[Array, "B Q H E"],
    k_BKHE: Float[Array, "B K H E"],
    v_BKHE: Float[Array, "B K H E"],
    mask: Bool[Array, "#B 1 #Q K"],
) -> Float[Array, "B Q H E"]:
    """Masked softmax attention at scale 1/sqrt(E), softmax in float32.

    The mask is finite inside: a query that may read nothing averages all values and is not NaN.
    """
    return jax.nn.dot_product_attention(q_BQHE, k_BKHE, v_BKHE, mask=mask, implementation="xla")
