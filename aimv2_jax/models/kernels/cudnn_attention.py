"""Prefix attention by cuDNN's flash attention, without scores [B, H, S, S]. B batch, S sequence, D = H·E width.

cuDNN knows causal masks and lengths, but no prefix mask; an additive mask would be an array of scores again. The rows
of a prefix mask are those of two masks that it knows: a query within the prefix attends to the prefix only, any other
one to all keys up to its own. Both are computed, and every query takes its row from one of them. This costs S²/2 + p²
pairs for a prefix p, 0.83 S² on average over prefixes, less than the S² of attention without a mask. The gradients are
exact: a row that is not taken has the cotangent 0, and adds 0 to those of keys and values.
"""

from __future__ import annotations

from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from aimv2_jax.models.precision import exact_products

ROW_MULTIPLE = 2  # Lengths in training that every cuDNN release accepts; some refuse odd ones (333 rows become 334).
HEAD_DIM_MULTIPLE, MAX_HEAD_DIM = 8, 128  # Channels per head; Hopper takes up to 256, earlier GPUs 128.
DTYPES = ("bfloat16", "float16")

MaskKind = Literal["prefix", "causal", "full"]


def attend(
    q: Float[Array, "B S D"],
    k: Float[Array, "B S D"],
    v: Float[Array, "B S D"],
    prefix: Int[Array, " B"],
    key_valid: Bool[Array, "B S"],
    kind: MaskKind,
    head_dim: int,
    implementation: Literal["cudnn", "xla"] = "cudnn",
) -> Float[Array, "B S D"]:
    """Masked softmax attention at scale 1/sqrt(E), heads contiguous; valid rows must precede the others.

    Queries that are not valid get finite numbers without meaning.

    Args:
      implementation: jax's implementation of the two masks; "xla" has the same numbers and is meant for tests.
    """
    length = q.shape[1]
    row = jnp.arange(length)
    num_valid = jnp.sum(key_valid, axis=1, dtype=jnp.int32)

    def run(q, k, v, **mask):
        heads = [x.reshape(*x.shape[:2], -1, head_dim) for x in (q, k, v)]
        with exact_products(q.dtype):
            out = jax.nn.dot_product_attention(*heads, implementation=implementation, **mask)
        return out.reshape(q.shape)

    if kind == "full":
        num_keys = jnp.maximum(num_valid, 1)  # An empty row of keys has no softmax.
        k, v = (_without_gradient_from(x, num_keys) for x in (k, v))
        return run(q, k, v, key_value_seq_lengths=num_keys)
    # A valid query comes before all invalid keys, so that the causal mask needs no lengths.
    causal = run(q, k, v, is_causal=True)
    if kind == "causal":
        return causal
    prefix = jnp.minimum(prefix, num_valid)
    num_rows = jnp.maximum(prefix, 1)
    q, k, v = (_without_gradient_from(x, num_rows) for x in (q, k, v))
    within = run(q, k, v, query_seq_lengths=num_rows, key_value_seq_lengths=num_rows)
    return jnp.where((row < prefix[:, None])[..., None], within, causal)


@jax.custom_vjp
def _without_gradient_from(x: Float[Array, "B S D"], num_rows: Int[Array, " B"]) -> Float[Array, "B S D"]:
    """Identity; the gradient of rows from `num_rows` on is 0, whatever a kernel writes behind the lengths it got."""
    return x


def _zero_rows(num_rows, dx):
    return jnp.where((jnp.arange(dx.shape[1]) < num_rows[:, None])[..., None], dx, 0), None


_without_gradient_from.defvjp(lambda x, num_rows: (x, num_rows), _zero_rows)


def valid_first(key_valid: Bool[Array, "B S"]) -> tuple[Int[Array, "B S"], Int[Array, "B S"]]:
    """Order that puts valid rows first and otherwise keeps rows in place, and its inverse."""
    order = jnp.argsort(~key_valid, axis=1, stable=True)
    return order, jnp.argsort(order, axis=1)


@jax.custom_vjp
def permute_rows(
    rows: Float[Array, "B S D"], order: Int[Array, "B S"], inverse: Int[Array, "B S"]
) -> Float[Array, "B S D"]:
    """Rows of every example in another order; the gradient is a gather by `inverse` in place of a scatter-add."""
    return jnp.take_along_axis(rows, order[..., None], axis=1, mode="clip")


permute_rows.defvjp(
    lambda rows, order, inverse: (permute_rows(rows, order, inverse), (order, inverse)),
    lambda orders, drows: (permute_rows(drows, *reversed(orders)), None, None),
)
