"""Attention masks and masked attention. B batch, Q queries, K keys, D width, H heads, E head dim.

All masks have one form: query i attends to key j iff (j <= i or j < prefix) and key j is valid. A prefix of 0 is causal
attention, a prefix of K full attention (RECIPE.md §2, §3).
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from aimv2_jax.models.kernels import flash_attention, short_attention
from aimv2_jax.models.precision import exact_products
from aimv2_jax.parallel import collectives

Implementation = Literal["xla", "pallas", "pallas_interpreted"]


class MaskSpec(NamedTuple):
    """Prefix mask in compact form, one prefix length per example."""

    prefix: Int[Array, " B"]
    key_valid: Bool[Array, "B K"]
    # Index of the first query among the keys; non-zero when earlier rows are cached.
    query_offset: Int[Array, ""] | int = 0

    def mask(self, num_queries: int) -> Bool[Array, "B 1 Q K"]:
        """Returns the dense boolean mask, True where attention is allowed."""
        query_Q1 = self.query_offset + jnp.arange(num_queries)[:, None]
        key_1K = jnp.arange(self.key_valid.shape[1])[None, :]
        in_prefix_B1K = key_1K < self.prefix[:, None, None]
        return (((key_1K <= query_Q1) | in_prefix_B1K) & self.key_valid[:, None, :])[:, None]


def full_mask(valid_BL: Bool[Array, "B L"]) -> MaskSpec:
    """Lets every query attend to every valid patch, as in inference and probes."""
    batch, length = valid_BL.shape
    return MaskSpec(jnp.full((batch,), length, jnp.int32), valid_BL)


def causal_mask(valid_BS: Bool[Array, "B S"], query_offset: Int[Array, ""] | int = 0) -> MaskSpec:
    """Lets query i attend to every valid key up to its own index."""
    return MaskSpec(jnp.zeros((valid_BS.shape[0],), jnp.int32), valid_BS, query_offset)


def attend(
    q: Float[Array, "B Q D"],
    k: Float[Array, "B K D"],
    v: Float[Array, "B K D"],
    mask_spec: MaskSpec,
    grad_dot: Float[Array, "B Q"] | None,
    heads: int,
    implementation: Implementation = "xla",
) -> Float[Array, "B Q D"]:
    """Masked softmax attention at scale 1/sqrt(E), softmax in float32; heads are contiguous slices of the width.

    Masked scores are finite: a query without any valid key averages all values and does not become NaN.

    Args:
      grad_dot: zeros whose cotangent the kernels set to the sum of dy · y over q, k and v (`ops.with_grad_dot`); None
        for "xla", whose caller collects it.
      implementation: "xla", or the Pallas kernel for the sequence length; kernels need queries and keys of the same
        sequence (no cache).
    """
    if implementation == "xla":
        assert grad_dot is None, "XLA's attention does not collect grad_dot"

        def split_heads(y):
            return y.reshape(*y.shape[:-1], heads, -1)

        mask = mask_spec.mask(q.shape[1])
        with exact_products(q.dtype):
            heads_qkv = split_heads(q), split_heads(k), split_heads(v)
            out = jax.nn.dot_product_attention(*heads_qkv, mask=mask, implementation="xla")
        return out.reshape(q.shape)
    kernel = short_attention if q.shape[1] <= short_attention.MAX_ROWS else flash_attention
    head_dim = q.shape[2] // heads

    def run_local(q, k, v, prefix, key_valid, grad_dot):
        assert q.shape[2] % head_dim == 0, "a head is split over devices; the kernels would leave its columns unwritten"
        return kernel.attend(q, k, v, prefix, key_valid, grad_dot, head_dim, implementation == "pallas_interpreted")

    batch_axes, head_axes = ("batch",), ("batch", "length", "heads")
    arrays = (
        (q, head_axes),
        (k, head_axes),
        (v, head_axes),
        (mask_spec.prefix, batch_axes),
        (mask_spec.key_valid, batch_axes),
        (grad_dot, batch_axes),
    )
    return collectives.map_local(run_local, arrays, head_axes)


def padded_rows(length: int, implementation: Implementation) -> int:
    """Length that a sequence is padded to, so that kernel blocks are whole tiles."""
    if implementation == "xla":
        return length
    multiple = short_attention.ROW_MULTIPLE if length <= short_attention.MAX_ROWS else flash_attention.ROW_MULTIPLE
    return -(-length // multiple) * multiple


def choose_attention(wanted: Literal["auto", "xla", "pallas"], head_dim: int, platform: str) -> Implementation:
    """Resolves "auto": the Pallas kernels on TPU if a head is whole tiles of 128 columns, else XLA.

    "pallas" on another platform runs the kernels interpreted, which is slow and meant for tests.
    """
    if wanted == "auto":
        return "pallas" if platform == "tpu" and head_dim % 128 == 0 else "xla"
    return "pallas_interpreted" if wanted == "pallas" and platform != "tpu" else wanted
