"""Attention for long sequences: softmax is taken block by block of keys, so that no row of scores ever stands whole.

B batch, S sequence, D = H·E width, E head dim. One program computes a block of queries (forward) or of keys (backward)
of one head; the other rows of the head stand whole in VMEM. Query i reads key j iff (j <= i or j < prefix) and j is
readable; blocks in which nobody reads anything are left out.
"""

from __future__ import annotations

import math
from functools import partial

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Bool, Float, Int

from aimv2_jax.models.kernels.whole_row import UNREAD, dots, matmul

MULTIPLE = 128  # Rows of the smallest block.

_LARGEST_BLOCK = 512
_VMEM_BYTES = 64 * 2**20  # A head's rows of 4608 and their gradients, twice each, for the next head is fetched ahead.


@partial(jax.custom_vjp, nondiff_argnums=(6, 7))
def attend(
    q: Float[Array, "B S D"],
    k: Float[Array, "B S D"],
    v: Float[Array, "B S D"],
    prefix: Int[Array, " B"],
    readable: Bool[Array, "B S"],
    told: Float[Array, "B S"],
    head_dim: int,
    interpret: bool | pltpu.InterpretParams,
) -> Float[Array, "B S D"]:
    """Masked softmax attention at scale 1/sqrt(E), heads contiguous; S a multiple of 128.

    The gradient of `told` is the sum of dy · y over q, k and v (`attention.tell`).
    """
    return _attend_forward(q, k, v, prefix, readable, told, head_dim, interpret)[0]


def _attend_forward(q, k, v, prefix, readable, told, head_dim, interpret):
    sizes = _Sizes(q, head_dim)
    out, total = pl.pallas_call(
        partial(_forward, block=sizes.block),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(sizes.batch, sizes.heads, sizes.num_blocks),
            in_specs=[sizes.keys, sizes.block_of_rows, sizes.all_rows, sizes.all_rows],
            out_specs=[sizes.block_of_rows, sizes.block_of_numbers],
        ),
        out_shape=[sizes.rows, sizes.numbers],
        interpret=interpret,
        name="online_attention_forward",
        **sizes.costs(num_matmuls=2, num_arrays=4, order=("parallel",) * 3),
    )(prefix, readable.astype(jnp.int32)[:, None], q, k, v)
    return out, (q, k, v, prefix, readable, out, total)


def _attend_backward(head_dim, interpret, saved, dout):
    q, k, v, prefix, readable, out, total = saved
    sizes = _Sizes(q, head_dim)
    product = out.astype(jnp.float32) * dout.astype(jnp.float32)
    mean = jnp.moveaxis(product.reshape(*q.shape[:2], sizes.heads, head_dim).sum(axis=-1), 2, 1)[..., None]
    dq, dk, dv = pl.pallas_call(
        partial(_backward, block=sizes.block),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(sizes.batch, sizes.heads, sizes.num_blocks),
            in_specs=[
                sizes.keys,
                sizes.all_rows,
                sizes.block_of_rows,
                sizes.block_of_rows,
                sizes.all_rows,
                sizes.all_numbers,
                sizes.all_numbers,
            ],
            out_specs=[sizes.all_rows, sizes.block_of_rows, sizes.block_of_rows],
            scratch_shapes=[pltpu.VMEM((q.shape[1], head_dim), jnp.float32)],
        ),
        out_shape=[sizes.rows] * 3,
        interpret=interpret,
        name="online_attention_backward",
        **sizes.costs(num_matmuls=5, num_arrays=7, order=("parallel", "parallel", "arbitrary")),
    )(prefix, readable.astype(jnp.int32)[:, None], q, k, v, dout, total, mean)
    return dq, dk, dv, None, None, dots((q, k, v), (dq, dk, dv))


attend.defvjp(_attend_forward, _attend_backward)


class _Sizes:
    """Shapes and blocks of one call: rows are [B, S, H·E], numbers a row and head are [B, H, S, 1] in float32."""

    def __init__(self, q: jax.Array, head_dim: int):
        self.batch, length, width = q.shape
        self.heads = width // head_dim
        self.block = next(n for n in range(_LARGEST_BLOCK, 0, -MULTIPLE) if length % n == 0)
        self.num_blocks = length // self.block
        self.rows = jax.ShapeDtypeStruct(q.shape, q.dtype)
        self.numbers = jax.ShapeDtypeStruct((self.batch, self.heads, length, 1), jnp.float32)
        self.block_of_rows = pl.BlockSpec((1, self.block, head_dim), lambda b, h, i, *_: (b, i, h))
        self.all_rows = pl.BlockSpec((1, length, head_dim), lambda b, h, i, *_: (b, 0, h))
        self.block_of_numbers = pl.BlockSpec((1, 1, self.block, 1), lambda b, h, i, *_: (b, h, i, 0))
        self.all_numbers = pl.BlockSpec((1, 1, length, 1), lambda b, h, i, *_: (b, h, 0, 0))
        self.keys = pl.BlockSpec((1, 1, length), lambda b, h, i, *_: (b, 0, 0))
        self._pairs, self._bytes = self.batch * length * length, q.size * q.dtype.itemsize
        self._width = width

    def costs(self, num_matmuls: int, num_arrays: int, order: tuple[str, ...]) -> dict:
        """What a call tells the compiler; all pairs are counted, also those that are left out."""
        return dict(
            compiler_params=pltpu.CompilerParams(dimension_semantics=order, vmem_limit_bytes=_VMEM_BYTES),
            cost_estimate=pl.CostEstimate(
                flops=num_matmuls * 2 * self._pairs * self._width,
                transcendentals=self._pairs * self.heads,
                bytes_accessed=num_arrays * self._bytes,
            ),
        )


def _forward(prefix_ref, readable_ref, q_ref, k_ref, v_ref, out_ref, total_ref, *, block: int):
    prefix, query_block = prefix_ref[pl.program_id(0)], pl.program_id(2)
    q = q_ref[0]

    def add(key_block, carry):
        largest, weight, out = carry
        keys = pl.ds(key_block * block, block)
        read = _read(prefix, readable_ref, query_block, key_block, block)
        scores = jnp.where(read, matmul(q, k_ref[0, keys], (1, 1)) / math.sqrt(q.shape[1]), UNREAD)
        new_largest = jnp.maximum(largest, jnp.max(scores, axis=1, keepdims=True))
        weights = jnp.exp(scores - new_largest)
        kept = jnp.exp(largest - new_largest)
        weight = weight * kept + jnp.sum(weights, axis=1, keepdims=True)
        v = v_ref[0, keys]
        return new_largest, weight, out * kept + matmul(weights.astype(v.dtype), v, (1, 0))

    # Keys up to the block's last query, and those of the prefix.
    num_key_blocks = jnp.maximum(query_block + 1, pl.cdiv(prefix, block))
    column = jnp.zeros((block, 1), jnp.float32)
    start = (column + UNREAD, column, jnp.zeros((block, q.shape[1]), jnp.float32))
    largest, weight, out = jax.lax.fori_loop(0, num_key_blocks, add, start)
    out_ref[0] = (out / weight).astype(out_ref.dtype)
    total_ref[0, 0] = largest + jnp.log(weight)


def _backward(
    prefix_ref,
    readable_ref,
    q_ref,
    k_ref,
    v_ref,
    dout_ref,
    total_ref,
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
        read = _read(prefix, readable_ref, query_block, key_block, block)
        scores = matmul(q, k, (1, 1)) * scale
        probabilities = jnp.where(read, jnp.exp(scores - total_ref[0, 0, queries]), 0)
        dv += matmul(probabilities.astype(dout.dtype), dout, (0, 0))
        dprobabilities = matmul(dout, v, (1, 1))
        dscores = (probabilities * (dprobabilities - mean_ref[0, 0, queries]) * scale).astype(q.dtype)
        dq_sum_ref[queries] += matmul(dscores, k, (1, 0))
        return dk + matmul(dscores, q, (0, 0)), dv

    # Queries from the block's first key on; all of them, where it holds keys of the prefix.
    first = jnp.where(key_block * block < prefix, 0, key_block)
    zeros = jnp.zeros(k.shape, jnp.float32)
    num_blocks = q_ref.shape[1] // block
    dk, dv = jax.lax.fori_loop(first, num_blocks, add, (zeros, zeros))
    dk_ref[0], dv_ref[0] = dk.astype(dk_ref.dtype), dv.astype(dv_ref.dtype)

    @pl.when(key_block == num_blocks - 1)
    def _():
        dq_ref[0] = dq_sum_ref[...].astype(dq_ref.dtype)


def _read(prefix, readable_ref, query_block, key_block, block: int) -> jax.Array:
    """Who reads whom of two blocks, bool [block of queries, block of keys]."""
    place = lambda first, axis: first * block + jax.lax.broadcasted_iota(jnp.int32, (block, block), axis)  # noqa: E731
    query, key = place(query_block, 0), place(key_block, 1)
    readable = readable_ref[0, :, pl.ds(key_block * block, block)] != 0
    return ((key <= query) | (key < prefix)) & readable
