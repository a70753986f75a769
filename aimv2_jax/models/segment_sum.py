"""Sum of rows by index without atomic additions. N rows, V segments, D width.

On a GPU a scatter-add is a series of atomic additions: their order, and with it the last bits, differ between runs, and
rows with one index wait for each other (jax-ml/jax#13672, openxla/xla#46225).
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def segment_sum(rows: Float[Array, "N D"], index: Int[Array, " N"], num_segments: int) -> Float[Array, "V D"]:
    """Sums the rows of every index 0 … V-1; chosen by the platform that the program is lowered for.

    GPUs use `sorted_segment_sum`, other platforms a scatter-add, which is deterministic there. The two differ in the
    order of the additions only.
    """

    def scatter_add(rows, index):
        return jnp.zeros((num_segments, rows.shape[1]), rows.dtype).at[index].add(rows)

    def by_sorting(rows, index):
        return sorted_segment_sum(rows, index, num_segments)

    return jax.lax.platform_dependent(rows, index, cuda=by_sorting, rocm=by_sorting, default=scatter_add)


def sorted_segment_sum(rows: Float[Array, "N D"], index: Int[Array, " N"], num_segments: int) -> Float[Array, "V D"]:
    """Sums the rows of every index 0 … V-1 in a fixed order: sort, segmented scan, and one gather of the totals.

    The order of the additions is a binary tree over the sorted rows. Memory is O(N·D), where a one-hot matmul would
    need N·V entries and 2·N·V·D FLOPs.
    """
    order = jnp.argsort(index, stable=True)
    index = index[order]
    is_first = jnp.concatenate([jnp.ones(1, bool), index[1:] != index[:-1]])

    def combine(left, right):
        left_first, left_sum = left
        right_first, right_sum = right
        return left_first | right_first, jnp.where(right_first, right_sum, left_sum + right_sum)

    _, sums = jax.lax.associative_scan(combine, (is_first[:, None], rows[order]))
    segment = jnp.arange(num_segments)
    last = jnp.searchsorted(index, segment, side="right", method="scan_unrolled") - 1
    row = jnp.maximum(last, 0)
    return jnp.where((index[row] == segment)[:, None], sums[row], 0)
