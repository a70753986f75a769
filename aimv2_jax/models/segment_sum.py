"""Sum of rows by index without atomic additions. N rows, V segments, D width.

On a GPU a scatter-add is a series of atomic additions: their order, and with it the last bits, differ between runs, and
rows with one index wait for each other (jax-ml/jax#13672, openxla/xla#46225).
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.extend.core import Primitive
from jax.interpreters import mlir
from jaxtyping import Array, Float, Int


def segment_sum(rows: Float[Array, "*N D"], index: Int[Array, "*N"], num_segments: int) -> Float[Array, "V D"]:
    """Sums the rows of every index 0 … V-1, in the way of the platform that the program is lowered for.

    GPUs use `sorted_segment_sum`, other platforms a scatter-add, which repeats its bits there. The two differ in the
    order of the additions only.
    """
    return _segment_sum.bind(rows, index, num_segments=num_segments)


def sorted_segment_sum(
    rows: Float[Array, "*N D"], index: Int[Array, "*N"], *, num_segments: int
) -> Float[Array, "V D"]:
    """Sums the rows of every index 0 … V-1 in a fixed order: sort, segmented scan, and one gather of the totals.

    The order of the additions is a binary tree over the sorted rows. Memory is O(N·D), where a one-hot matmul would
    need N·V entries and 2·N·V·D FLOPs.
    """
    rows, index = rows.reshape(-1, rows.shape[-1]), index.reshape(-1)
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


def _scatter_add(rows, index, *, num_segments):
    return jnp.zeros((num_segments, rows.shape[-1]), rows.dtype).at[index].add(rows)


# A primitive, because `jax.lax.platform_dependent` would leave a conditional in the programs of all platforms.
_segment_sum = Primitive("segment_sum")
_segment_sum.def_impl(
    lambda rows, index, *, num_segments: jax.jit(segment_sum, static_argnums=2)(rows, index, num_segments)
)
_segment_sum.def_abstract_eval(lambda rows, index, *, num_segments: rows.update(shape=(num_segments, rows.shape[-1])))
mlir.register_lowering(_segment_sum, mlir.lower_fun(_scatter_add, multiple_results=False))
for _platform in ("cuda", "rocm"):
    mlir.register_lowering(_segment_sum, mlir.lower_fun(sorted_segment_sum, multiple_results=False), platform=_platform)
