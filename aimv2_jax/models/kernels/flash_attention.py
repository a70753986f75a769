"""Flash attention for long sequences: online softmax over blocks of keys, without a full row of scores.

B batch, S sequence, D = H·E width, E head dim. One program computes a block of queries (forward) or of keys (backward)
of one head; the other rows of the head are all in VMEM. Query i attends to key j iff (j <= i or j < prefix) and key j
is valid; blocks without any allowed pair are skipped.
"""

from __future__ import annotations

import math
from functools import partial

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Bool, Float, Int

from aimv2_jax.models.kernels.short_attention import MASK_VALUE, matmul
from aimv2_jax.models.ops import row_dot

ROW_MULTIPLE = 128  # The smallest block has 128 rows.

_MAX_BLOCK_ROWS = 512
# A head's 4608 rows and their gradients, twice each, because the next head is prefetched.
_VMEM_BYTES = 64 * 2**20


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
    """Masked softmax attention at scale 1/sqrt(E), heads contiguous; S a multiple of 128.

    The cotangent of `grad_dot` is sum(dy · y) over q, k and v (`ops.with_grad_dot`).
    """
    return _attend_forward(q, k, v, prefix, key_valid, grad_dot, head_dim, interpret)[0]


def _attend_forward(q, k, v, prefix, key_valid, grad_dot, head_dim, interpret):
    layout = _Layout(q, head_dim)
    out, logsumexp = pl.pallas_call(
        partial(_forward, block=layout.block),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(layout.batch, layout.heads, layout.num_blocks),
            in_specs=[layout.keys, layout.block_of_rows, layout.all_rows, layout.all_rows],
            out_specs=[layout.block_of_rows, layout.block_of_stats],
        ),
        out_shape=[layout.rows, layout.stats],
        interpret=interpret,
        name="online_attention_forward",
        **layout.costs(num_matmuls=2, num_arrays=4, order=("parallel",) * 3),
    )(prefix, key_valid.astype(jnp.int32)[:, None], q, k, v)
    return out, (q, k, v, prefix, key_valid, out, logsumexp)


def _attend_backward(head_dim, interpret, saved, dout):
    q, k, v, prefix, key_valid, out, logsumexp = saved
    layout = _Layout(q, head_dim)
    product = out.astype(jnp.float32) * dout.astype(jnp.float32)
    mean = jnp.moveaxis(product.reshape(*q.shape[:2], layout.heads, head_dim).sum(axis=-1), 2, 1)[..., None]
    dq, dk, dv = pl.pallas_call(
        partial(_backward, block=layout.block),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(layout.batch, layout.heads, layout.num_blocks),
            in_specs=[
                layout.keys,
                layout.all_rows,
                layout.block_of_rows,
                layout.block_of_rows,
                layout.all_rows,
                layout.all_stats,
                layout.all_stats,
            ],
            out_specs=[layout.all_rows, layout.block_of_rows, layout.block_of_rows],
            scratch_shapes=[pltpu.VMEM((q.shape[1], head_dim), jnp.float32)],
        ),
        out_shape=[layout.rows] * 3,
        interpret=interpret,
        name="online_attention_backward",
        **layout.costs(num_matmuls=5, num_arrays=7, order=("parallel", "parallel", "arbitrary")),
    )(prefix, key_valid.astype(jnp.int32)[:, None], q, k, v, dout, logsumexp, mean)
    return dq, dk, dv, None, None, row_dot((q, k, v), (dq, dk, dv))


attend.defvjp(_attend_forward, _attend_backward)


class _Layout:
    """Shapes and blocks of one call: rows are [B, S, H·E], row statistics are [B, H, S, 1] in float32."""

    def __init__(self, q: jax.Array, head_dim: int):
        self.batch, length, width = q.shape
        self.heads = width // head_dim
        self.block = next(n for n in range(_MAX_BLOCK_ROWS, 0, -ROW_MULTIPLE) if length % n == 0)
        self.num_blocks = length // self.block
        self.rows = jax.ShapeDtypeStruct(q.shape, q.dtype)
        self.stats = jax.ShapeDtypeStruct((self.batch, self.heads, length, 1), jnp.float32)
        self.block_of_rows = pl.BlockSpec((1, self.block, head_dim), lambda b, h, i, *_: (b, i, h))
        self.all_rows = pl.BlockSpec((1, length, head_dim), lambda b, h, i, *_: (b, 0, h))
        self.block_of_stats = pl.BlockSpec((1, 1, self.block, 1), lambda b, h, i, *_: (b, h, i, 0))
        self.all_stats = pl.BlockSpec((1, 1, length, 1), lambda b, h, i, *_: (b, h, 0, 0))
        self.keys = pl.BlockSpec((1, 1, length), lambda b, h, i, *_: (b, 0, 0))
        self._pairs = self.batch * length * length
        self._bytes = q.size * q.dtype.itemsize
        self._width = width

    def costs(self, num_matmuls: int, num_arrays: int, order: tuple[str, ...]) -> dict:
        """Compiler parameters and cost estimate; counts all pairs, including skipped ones."""
        return dict(
            compiler_params=pltpu.CompilerParams(dimension_semantics=order, vmem_limit_bytes=_VMEM_BYTES),
            cost_estimate=pl.CostEstimate(
                flops=num_matmuls * 2 * self._pairs * self._width,
                transcendentals=self._pairs * self.heads,
                bytes_accessed=num_arrays * self._bytes,
            ),
        )


def _forward(prefix_ref, key_valid_ref, q_ref, k_ref, v_ref, out_ref, logsumexp_ref, *, block: int):
    prefix, query_block = prefix_ref[pl.program_id(0)], pl.program_id(2)
    q = q_ref[0]

    def add(key_block, carry):
        row_max, row_sum, out = carry
        keys = pl.ds(key_block * block, block)
        mask = _mask(prefix, key_valid_ref, query_block, key_block, block)
        scores = jnp.where(mask, matmul(q, k_ref[0, keys], (1, 1)) / math.sqrt(q.shape[1]), MASK_VALUE)
        new_max = jnp.maximum(row_max, jnp.max(scores, axis=1, keepdims=True))
        weights = jnp.exp(scores - new_max)
        rescale = jnp.exp(row_max - new_max)
        row_sum = row_sum * rescale + jnp.sum(weights, axis=1, keepdims=True)
        v = v_ref[0, keys]
        return new_max, row_sum, out * rescale + matmul(weights.astype(v.dtype), v, (1, 0))

    # The loop covers the keys up to the block's last query, and the prefix.
    num_key_blocks = jnp.maximum(query_block + 1, pl.cdiv(prefix, block))
    column = jnp.zeros((block, 1), jnp.float32)
    initial = (column + MASK_VALUE, column, jnp.zeros((block, q.shape[1]), jnp.float32))
    row_max, row_sum, out = jax.lax.fori_loop(0, num_key_blocks, add, initial)
    out_ref[0] = (out / row_sum).astype(out_ref.dtype)
    logsumexp_ref[0, 0] = row_max + jnp.log(row_sum)


def _backward(
    prefix_ref,
    key_valid_ref,
    q_ref,
    k_ref,
    v_ref,
    dout_ref,
    logsumexp_ref,
    mean_ref,
    dq_ref,
    dk_ref,
    dv_ref,
    dq_sum_ref,
    *,
    block: int,
):
    prefix, key_block = prefix_ref[pl.program_id(0)], pl.program_id(2)
    k, v = k_ref[0], v_ref[0]
    scale = 1 / math.sqrt(k.shape[1])

    @pl.when(key_block == 0)
    def _():
        dq_sum_ref[...] = jnp.zeros_like(dq_sum_ref)

    def add(query_block, carry):
        dk, dv = carry
        queries = pl.ds(query_block * block, block)
        q, dout = q_ref[0, queries], dout_ref[0, queries]
        mask = _mask(prefix, key_valid_ref, query_block, key_block, block)
        scores = matmul(q, k, (1, 1)) * scale
        probabilities = jnp.where(mask, jnp.exp(scores - logsumexp_ref[0, 0, queries]), 0)
        dv += matmul(probabilities.astype(dout.dtype), dout, (0, 0))
        dprobabilities = matmul(dout, v, (1, 1))
        dscores = (probabilities * (dprobabilities - mean_ref[0, 0, queries]) * scale).astype(q.dtype)
        dq_sum_ref[queries] += matmul(dscores, k, (1, 0))
        return dk + matmul(dscores, q, (0, 0)), dv

    # The loop starts at the block's first key, or at query 0 if the block has keys of the prefix.
    first = jnp.where(key_block * block < prefix, 0, key_block)
    zeros = jnp.zeros(k.shape, jnp.float32)
    num_blocks = q_ref.shape[1] // block
    dk, dv = jax.lax.fori_loop(first, num_blocks, add, (zeros, zeros))
    dk_ref[0], dv_ref[0] = dk.astype(dk_ref.dtype), dv.astype(dv_ref.dtype)

    @pl.when(key_block == num_blocks - 1)
    def _():
        dq_ref[0] = dq_sum_ref[...].astype(dq_ref.dtype)


def _mask(prefix, key_valid_ref, query_block, key_block, block: int) -> jax.Array:
    """Attention mask of a block of queries and a block of keys, bool [queries, keys]."""

    def indices(block_index, axis):
        return block_index * block + jax.lax.broadcasted_iota(jnp.int32, (block, block), axis)

    query, key = indices(query_block, 0), indices(key_block, 1)
    key_valid = key_valid_ref[0, :, pl.ds(key_block * block, block)] != 0
    return ((key <= query) | (key < prefix)) & key_valid
