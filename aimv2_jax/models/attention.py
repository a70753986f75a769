"""Who may read whom, and the attention that obeys. B batch, Q queries, K keys, D width, H heads, E head dim.

Every mask of the method has one form: query i reads key j iff (j <= i or j < prefix) and j is readable. A prefix of 0
is causal attention, a prefix of K full attention (RECIPE.md §2, §3).
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from aimv2_jax.models import placement
from aimv2_jax.models.kernels import online, whole_row
from aimv2_jax.models.precision import exact_products

Implementation = Literal["xla", "pallas", "pallas_interpreted"]


class Reads(NamedTuple):
    """Who may read whom, by example."""

    prefix: Int[Array, " B"]
    readable: Bool[Array, "B K"]
    first: Int[Array, ""] | int = 0  # Place of the first query among the keys: not 0 where earlier rows are cached.

    def mask(self, num_queries: int) -> Bool[Array, "B 1 Q K"]:
        """The same, spelt out."""
        query_Q1 = self.first + jnp.arange(num_queries)[:, None]
        key_1K = jnp.arange(self.readable.shape[1])[None, :]
        in_prefix_B1K = key_1K < self.prefix[:, None, None]
        return (((key_1K <= query_Q1) | in_prefix_B1K) & self.readable[:, None, :])[:, None]


def full_reads(valid_BL: Bool[Array, "B L"]) -> Reads:
    """Every query reads every valid patch: inference and probes."""
    batch, length = valid_BL.shape
    return Reads(jnp.full((batch,), length, jnp.int32), valid_BL)


def causal_reads(valid_BS: Bool[Array, "B S"], first: Int[Array, ""] | int = 0) -> Reads:
    """Query i reads every valid key up to its own place."""
    return Reads(jnp.zeros((valid_BS.shape[0],), jnp.int32), valid_BS, first)


@jax.custom_vjp
def tell(outputs: tuple[Float[Array, "*rows D"], ...], told: Float[Array, "*rows"]) -> tuple[Array, ...]:
    """`outputs` as they are; on the way back, the gradient of `told` is the sum of dy · y over all of them.

    What that is for: `layers.normalise`.
    """
    return outputs


tell.defvjp(
    lambda outputs, told: (outputs, outputs), lambda outputs, gradients: (gradients, whole_row.dots(outputs, gradients))
)


def attend(
    q: Float[Array, "B Q D"],
    k: Float[Array, "B K D"],
    v: Float[Array, "B K D"],
    reads: Reads,
    told: Float[Array, "B Q"] | None,
    heads: int,
    implementation: Implementation = "xla",
) -> Float[Array, "B Q D"]:
    """Masked softmax attention at scale 1/sqrt(E), softmax in float32; heads are contiguous slices of the width.

    The mask is finite inside: a query that may read nothing averages all values and is not NaN.

    Args:
      told: what is told of q, k and v on the way back (`tell`); None where it has been.
      implementation: "xla"; or the Pallas kernel that fits the length, for queries and keys of one sequence (no cache).
    """
    if implementation == "xla":
        split = lambda y: y.reshape(*y.shape[:-1], heads, -1)  # noqa: E731
        mask = reads.mask(q.shape[1])
        if told is not None:
            q, k, v = tell((q, k, v), told)
        with exact_products(q.dtype):
            out = jax.nn.dot_product_attention(split(q), split(k), split(v), mask=mask, implementation="xla")
        return out.reshape(q.shape)
    kernel = whole_row if q.shape[1] <= whole_row.MOST_ROWS else online
    head_dim = q.shape[2] // heads

    def run(q, k, v, prefix, readable, told):
        assert q.shape[2] % head_dim == 0, "a head is on several devices; the kernels would leave its columns unwritten"
        return kernel.attend(q, k, v, prefix, readable, told, head_dim, implementation == "pallas_interpreted")

    rows, by_head = ("batch",), ("batch", "length", "heads")
    arrays = ((q, by_head), (k, by_head), (v, by_head), (reads.prefix, rows), (reads.readable, rows), (told, rows))
    return placement.by_device(run, arrays, by_head)


def padded_rows(length: int, implementation: Implementation) -> int:
    """Rows that a sequence of `length` is padded to, so that the kernels' blocks are whole tiles."""
    if implementation == "xla":
        return length
    multiple = whole_row.MULTIPLE if length <= whole_row.MOST_ROWS else online.MULTIPLE
    return -(-length // multiple) * multiple


def choose_attention(wanted: Literal["auto", "xla", "pallas"], head_dim: int, platform: str) -> Implementation:
    """What runs where "auto" is asked: our kernels on TPU, where a head is whole tiles of 128 columns; else XLA.

    Kernels that are asked for by name on another platform are interpreted, which is slow and for tests.
    """
    if wanted == "auto":
        return "pallas" if platform == "tpu" and head_dim % 128 == 0 else "xla"
    return "pallas_interpreted" if wanted == "pallas" and platform != "tpu" else wanted
