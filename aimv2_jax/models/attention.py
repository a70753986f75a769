"""Attention masks and masked attention. B batch, Q queries, K keys, D width, H heads, E head dim.

All masks have one form: query i attends to key j iff (j <= i or j < prefix) and key j is valid. A prefix of 0 is causal
attention, a prefix of K full attention (RECIPE.md §2, §3).
"""

from __future__ import annotations

from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from aimv2_jax.models.kernels import cudnn_attention, flash_attention, short_attention
from aimv2_jax.models.kernels.cudnn_attention import MaskKind
from aimv2_jax.models.precision import exact_products
from aimv2_jax.parallel import collectives

Implementation = Literal["xla", "pallas", "pallas_interpreted", "cudnn", "cudnn_on_xla"]

# jax's implementation of the masks that cuDNN's attention consists of.
_CUDNN: dict[str, Literal["cudnn", "xla"]] = {"cudnn": "cudnn", "cudnn_on_xla": "xla"}


class MaskSpec(NamedTuple):
    """Prefix mask in compact form, one prefix length per example."""

    prefix: Int[Array, " B"]
    key_valid: Bool[Array, "B K"]
    # Index of the first query among the keys; non-zero when earlier rows are cached.
    query_offset: Int[Array, ""] | int = 0
    # What is known about `prefix` when a program is traced: 0 for "causal", all keys for "full".
    kind: MaskKind = "prefix"

    def mask(self, num_queries: int) -> Bool[Array, "B 1 Q K"]:
        """Returns the dense boolean mask, True where attention is allowed."""
        query_Q1 = self.query_offset + jnp.arange(num_queries)[:, None]
        key_1K = jnp.arange(self.key_valid.shape[1])[None, :]
        in_prefix_B1K = key_1K < self.prefix[:, None, None]
        return (((key_1K <= query_Q1) | in_prefix_B1K) & self.key_valid[:, None, :])[:, None]


def full_mask(valid_BL: Bool[Array, "B L"]) -> MaskSpec:
    """Lets every query attend to every valid patch, as in inference and probes."""
    batch, length = valid_BL.shape
    return MaskSpec(jnp.full((batch,), length, jnp.int32), valid_BL, kind="full")


def causal_mask(valid_BS: Bool[Array, "B S"], query_offset: Int[Array, ""] | int = 0) -> MaskSpec:
    """Lets query i attend to every valid key up to its own index."""
    return MaskSpec(jnp.zeros((valid_BS.shape[0],), jnp.int32), valid_BS, query_offset, "causal")


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
      grad_dot: zeros whose cotangent the Pallas kernels set to the sum of dy · y over q, k and v
        (`ops.with_grad_dot`); None for the others, whose caller collects it.
      implementation: "xla", cuDNN's, or the Pallas kernel for the sequence length; all but "xla" need queries and keys
        of the same sequence (no cache), and cuDNN's the valid ones first (`valid_rows_first`).
    """
    assert (grad_dot is not None) == collects_grad_dot(implementation)
    if implementation == "xla":

        def split_heads(y):
            return y.reshape(*y.shape[:-1], heads, -1)

        mask = mask_spec.mask(q.shape[1])
        with exact_products(q.dtype):
            heads_qkv = split_heads(q), split_heads(k), split_heads(v)
            out = jax.nn.dot_product_attention(*heads_qkv, mask=mask, implementation="xla")
        return out.reshape(q.shape)
    head_dim = q.shape[2] // heads
    batch_axes, head_axes = ("batch",), ("batch", "length", "heads")
    arrays = (
        (q, head_axes),
        (k, head_axes),
        (v, head_axes),
        (mask_spec.prefix, batch_axes),
        (mask_spec.key_valid, batch_axes),
    )
    if implementation in _CUDNN:
        run_cudnn = partial(
            cudnn_attention.attend, kind=mask_spec.kind, head_dim=head_dim, implementation=_CUDNN[implementation]
        )
        return collectives.map_local(run_cudnn, arrays, head_axes)
    kernel = short_attention if q.shape[1] <= short_attention.MAX_ROWS else flash_attention

    def run_local(q, k, v, prefix, key_valid, grad_dot):
        assert q.shape[2] % head_dim == 0, "a head is split over devices; the kernels would leave its columns unwritten"
        return kernel.attend(q, k, v, prefix, key_valid, grad_dot, head_dim, implementation == "pallas_interpreted")

    return collectives.map_local(run_local, (*arrays, (grad_dot, batch_axes)), head_axes)


def collects_grad_dot(implementation: Implementation) -> bool:
    """Whether the implementation computes the cotangent of `grad_dot`."""
    return implementation in ("pallas", "pallas_interpreted")


def needs_valid_rows_first(implementation: Implementation) -> bool:
    """Whether the implementation knows lengths of valid rows only, not which rows are valid."""
    return implementation in _CUDNN


class RowOrder(NamedTuple):
    """Order of rows within every example, and its inverse."""

    order: Int[Array, "B S"]
    inverse: Int[Array, "B S"]

    def apply(self, rows: Float[Array, "B S D"]) -> Float[Array, "B S D"]:
        """Returns the rows in this order."""
        return _permute(rows, self.order, self.inverse)

    def undo(self, rows: Float[Array, "B S D"]) -> Float[Array, "B S D"]:
        """Returns rows that were permuted by `apply` in their old places."""
        return _permute(rows, self.inverse, self.order)


def valid_rows_first(mask_spec: MaskSpec) -> tuple[RowOrder, MaskSpec]:
    """The order that puts valid rows before the others, and the mask of the rows in that order.

    The order of valid rows among themselves stays, so that a prefix becomes the valid rows that it contains, and a
    causal mask remains one.
    """
    valid = mask_spec.key_valid
    in_prefix = jnp.arange(valid.shape[1]) < mask_spec.prefix[:, None]
    prefix = jnp.sum(valid & in_prefix, axis=1, dtype=jnp.int32)
    num_valid = jnp.sum(valid, axis=1, keepdims=True)
    sorted_valid = jnp.arange(valid.shape[1]) < num_valid
    order = RowOrder(*cudnn_attention.valid_first(valid))
    return order, mask_spec._replace(prefix=prefix, key_valid=sorted_valid)


def _permute(rows, order, inverse):
    axes = ("batch", "length", "activation")
    arrays = ((rows, axes), (order, ("batch",)), (inverse, ("batch",)))
    return collectives.map_local(cudnn_attention.permute_rows, arrays, axes)


def padded_rows(length: int, implementation: Implementation) -> int:
    """Length that a sequence is padded to, so that kernel blocks are whole tiles."""
    if implementation == "xla":
        return length
    if implementation in _CUDNN:
        return -(-length // cudnn_attention.ROW_MULTIPLE) * cudnn_attention.ROW_MULTIPLE
    multiple = short_attention.ROW_MULTIPLE if length <= short_attention.MAX_ROWS else flash_attention.ROW_MULTIPLE
    return -(-length // multiple) * multiple


def choose_attention(
    wanted: Literal["auto", "xla", "pallas", "cudnn"], head_dim: int, platform: str, dtype: Any
) -> Implementation:
    """Resolves "auto": on TPU the Pallas kernels, on GPU cuDNN's, where they take the heads and dtype; else XLA.

    The Pallas kernels need heads of whole tiles of 128 columns. Both run on other platforms for tests: "pallas"
    interpreted, which is slow, "cudnn" with jax's implementation of the same masks.
    """
    if wanted == "auto":
        if platform == "tpu" and head_dim % 128 == 0:
            return "pallas"
        return "cudnn" if platform == "gpu" and takes_cudnn(head_dim, dtype) else "xla"
    if wanted == "pallas" and platform != "tpu":
        return "pallas_interpreted"
    return "cudnn_on_xla" if wanted == "cudnn" and platform != "gpu" else wanted


def takes_cudnn(head_dim: int, dtype: Any) -> bool:
    """Whether cuDNN's attention accepts heads of this size and activations of this dtype."""
    fits = head_dim % cudnn_attention.HEAD_DIM_MULTIPLE == 0 and head_dim <= cudnn_attention.MAX_HEAD_DIM
    return fits and jnp.dtype(dtype).name in cudnn_attention.DTYPES
