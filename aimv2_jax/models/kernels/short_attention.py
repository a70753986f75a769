"""Single-pass attention for short sequences: all scores of a head fit in VMEM, so softmax needs no second pass.

B batch, S sequence, D = H·E width, E head dim. One program computes a few heads of one example. Query i attends to key
j iff (j <= i or j < prefix) and key j is valid.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Bool, Float, Int

from aimv2_jax.models.precision import exact_products

# Scores, probabilities and their gradients, 2 MB each in float32, fit in 16 MB of VMEM beside the rows.
MAX_ROWS = 704
ROW_MULTIPLE = 16  # A bfloat16 tile has 16 rows.

# More heads per program would only make the blocks larger.
MAX_HEADS_PER_PROGRAM = 4
# XLA's attention masks with the same value. It is finite, so a query without valid keys does not become NaN.
MASK_VALUE = -0.7 * float(jnp.finfo(jnp.float32).max)


@partial(jax.custom_vjp, nondiff_argnums=(6, 7))
def attend(
    q: Float[Array, "B S D"],
    k: Float[Array, "B S D"],
    v: Float[Array, "B S D"],
    prefix: Int[Array, " B"],
    key_valid: Bool[Array, "B S"],
    grad_dot: Float[Array, "B S"],
    head_dim: int,
    interpret: bool | pltpu.InterpretParams,
) -> Float[Array, "B S D"]:
    """Masked softmax attention at scale 1/sqrt(E), heads contiguous; S a multiple of 16 and at most `MAX_ROWS`.

    The cotangent of `grad_dot` is sum(dy · y) over q, k and v (`ops.with_grad_dot`).
    """
    return _call(_forward, (q, k, v), prefix, key_valid, head_dim, interpret)[0]


def _attend_forward(q, k, v, prefix, key_valid, grad_dot, head_dim, interpret):
    return attend(q, k, v, prefix, key_valid, grad_dot, head_dim, interpret), (q, k, v, prefix, key_valid)


def _attend_backward(head_dim, interpret, saved, dout):
    q, k, v, prefix, key_valid = saved
    dq, dk, dv, grad_dot = _call(_backward, (q, k, v, dout), prefix, key_valid, head_dim, interpret)
    return dq, dk, dv, None, None, jnp.sum(grad_dot, axis=(1, 3))


attend.defvjp(_attend_forward, _attend_backward)


def _call(
    kernel: Callable[..., None],
    rows: tuple[jax.Array, ...],
    prefix: jax.Array,
    key_valid: jax.Array,
    head_dim: int,
    interpret: bool | pltpu.InterpretParams,
) -> Sequence[jax.Array]:
    batch, length, width = rows[0].shape
    heads = width // head_dim
    group = next(n for n in range(min(MAX_HEADS_PER_PROGRAM, heads), 0, -1) if heads % n == 0)
    row_block = pl.BlockSpec((1, length, group * head_dim), lambda b, h, *_: (b, 0, h))
    key_block = pl.BlockSpec((1, 1, length), lambda b, h, *_: (b, 0, 0))
    pairs = batch * heads * length * length
    shape = jax.ShapeDtypeStruct(rows[0].shape, rows[0].dtype)
    if kernel is _backward:
        grad_dot = jax.ShapeDtypeStruct((batch, heads // group, length, 1), jnp.float32)
        grad_dot_block = pl.BlockSpec((1, 1, length, 1), lambda b, h, *_: (b, h, 0, 0))
        outputs = [shape] * 3 + [grad_dot]
        blocks = [row_block] * 3 + [grad_dot_block]
        num_matmuls = 5
        name = "backward"
    else:
        outputs = [shape]
        blocks = [row_block]
        num_matmuls = 2
        name = "forward"
    return pl.pallas_call(
        partial(kernel, head_dim=head_dim),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(batch, heads // group),
            in_specs=[key_block] + [row_block] * len(rows),
            out_specs=blocks,
        ),
        out_shape=outputs,
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel")),
        cost_estimate=pl.CostEstimate(
            flops=num_matmuls * 2 * pairs * head_dim,
            transcendentals=pairs,
            bytes_accessed=(len(rows) + len(outputs)) * rows[0].size * rows[0].dtype.itemsize,
        ),
        interpret=interpret,
        name=f"whole_row_attention_{name}",
    )(prefix, key_valid.astype(jnp.int32)[:, None], *rows)


def _heads(block: Any, head_dim: int) -> list[tuple]:
    """Returns the index of each head's columns in a block [1, S, heads·E]."""
    return [(0, slice(None), pl.ds(i * head_dim, head_dim)) for i in range(block.shape[2] // head_dim)]


def _forward(prefix_ref, key_valid_ref, q_ref, k_ref, v_ref, out_ref, *, head_dim: int):
    mask = _mask(prefix_ref, key_valid_ref)
    for head in _heads(q_ref, head_dim):
        probabilities = _probabilities(q_ref[head], k_ref[head], mask)
        v = v_ref[head]
        out_ref[head] = matmul(probabilities.astype(v.dtype), v, (1, 0)).astype(out_ref.dtype)


def _backward(
    prefix_ref, key_valid_ref, q_ref, k_ref, v_ref, dout_ref, dq_ref, dk_ref, dv_ref, grad_dot_ref, *, head_dim: int
):
    mask = _mask(prefix_ref, key_valid_ref)
    grad_dot = jnp.zeros(grad_dot_ref.shape[2:], jnp.float32)
    for head in _heads(q_ref, head_dim):
        q, k, v, dout = q_ref[head], k_ref[head], v_ref[head], dout_ref[head]
        probabilities = _probabilities(q, k, mask)
        dv = matmul(probabilities.astype(v.dtype), dout, (0, 0))
        dprobabilities = matmul(dout, v, (1, 1))
        mean = jnp.sum(probabilities * dprobabilities, axis=1, keepdims=True)
        # The scores of masked pairs are constants, so their gradient is 0.
        dscores = jnp.where(mask, probabilities * (dprobabilities - mean) / math.sqrt(head_dim), 0).astype(q.dtype)
        dq, dk = matmul(dscores, k, (1, 0)), matmul(dscores, q, (0, 0))
        grad_dot += jnp.sum(dq * q + dk * k + dv * v, axis=1, keepdims=True)
        for ref, gradient in ((dq_ref, dq), (dk_ref, dk), (dv_ref, dv)):
            ref[head] = gradient.astype(ref.dtype)
    grad_dot_ref[0, 0] = grad_dot


def _mask(prefix_ref, key_valid_ref) -> jax.Array:
    """Attention mask of one example, bool [S, S]."""
    length = key_valid_ref.shape[2]
    query, key = (jax.lax.broadcasted_iota(jnp.int32, (length, length), axis) for axis in (0, 1))
    return ((key <= query) | (key < prefix_ref[pl.program_id(0)])) & (key_valid_ref[0] != 0)


def _probabilities(q: jax.Array, k: jax.Array, mask: jax.Array) -> jax.Array:
    """Softmax of the scores of one head, float32 [S, S]."""
    scores = jnp.where(mask, matmul(q, k, (1, 1)) / math.sqrt(q.shape[1]), MASK_VALUE)
    weights = jnp.exp(scores - jnp.max(scores, axis=1, keepdims=True))
    return weights / jnp.sum(weights, axis=1, keepdims=True)


def matmul(a: jax.Array, b: jax.Array, contract: tuple[int, int]) -> jax.Array:
    """Contracts one dimension of `a` with one of `b`, accumulating in float32."""
    with exact_products(a.dtype):
        dims = (((contract[0],), (contract[1],)), ((), ()))
        return jax.lax.dot_general(a, b, dims, preferred_element_type=jnp.float32)
