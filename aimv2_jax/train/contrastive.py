"""Contrastive losses over the global batch, as sums over its valid rows.

B batch, E embedding.

Each device compares its own rows with all B rows of the other tower, which are gathered once, in chunks: an array of
logits has B / (devices · chunks) rows and is recomputed in the backward pass. Embeddings are float32.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from aimv2_jax.models.precision import exact_products
from aimv2_jax.parallel import collectives

RowLoss = Callable[..., jax.Array]


class ContrastiveSums(NamedTuple):
    """Sums over the valid rows of a batch: the loss, and the images whose logit is highest for their own text."""

    loss: Float[Array, ""]
    correct: Int[Array, ""]


def softmax_sums(
    image: Float[Array, "B E"],
    text: Float[Array, "B E"],
    scale: Float[Array, ""],
    valid: Bool[Array, " B"],
    chunks: int = 1,
) -> ContrastiveSums:
    """CLIP's loss: half the cross-entropy of texts given an image, and half that of images given a text.

    Args:
      image, text: embeddings of length 1; row i of one belongs to row i of the other.
      scale: factor of the logits, scale · image · text.
      valid: False on padding, which is neither a row nor a negative.
      chunks: parts into which each device divides its rows; changes results by rounding only.
    """
    bias = jnp.zeros((), scale.dtype)
    sums = [
        _sum_rows(_cross_entropy, rows, others, scale, bias, valid, chunks)
        for rows, others in ((image, text), (text, image))
    ]
    return ContrastiveSums((sums[0].loss + sums[1].loss) / 2, sums[0].correct)


def sigmoid_sums(
    image: Float[Array, "B E"],
    text: Float[Array, "B E"],
    scale: Float[Array, ""],
    bias: Float[Array, ""],
    valid: Bool[Array, " B"],
    chunks: int = 1,
) -> ContrastiveSums:
    """SigLIP's loss: binary cross-entropy of every image with every text, with logits scale · image · text + bias.

    Other arguments as in `softmax_sums`.
    """
    return _sum_rows(_binary_cross_entropy, image, text, scale, bias, valid, chunks)


def _cross_entropy(logits_B: Array, is_own_B: Array, valid_B: Array) -> Array:
    masked_B = jnp.where(valid_B, logits_B, jnp.finfo(logits_B.dtype).min)
    return jax.nn.logsumexp(masked_B) - jnp.sum(logits_B, where=is_own_B)


def _binary_cross_entropy(logits_B: Array, is_own_B: Array, valid_B: Array) -> Array:
    return -jnp.sum(jax.nn.log_sigmoid(jnp.where(is_own_B, logits_B, -logits_B)), where=valid_B)


def _sum_rows(
    row_loss: RowLoss, rows: Array, others: Array, scale: Array, bias: Array, valid: Array, chunks: int
) -> ContrastiveSums:
    """Sums `row_loss(logits, is_own, valid)` of each row's logits with all `others`."""
    batch, embedding = ("batch",), ("batch", "activation")
    arrays = (
        (rows, embedding),
        (others, embedding),
        (scale, ()),
        (bias, ()),
        (valid, batch),
        (jnp.arange(rows.shape[0]), batch),
    )
    losses_B, is_correct_B = collectives.map_local(partial(_local_rows, row_loss, chunks), arrays, batch)
    return ContrastiveSums(
        jnp.sum(losses_B, where=valid),
        jnp.sum(is_correct_B, where=valid),
    )


def _local_rows(
    row_loss: RowLoss,
    chunks: int,
    rows: Array,
    others: Array,
    scale: Array,
    bias: Array,
    valid: Array,
    index: Array,
) -> tuple[Array, Array]:
    """Loss of each row of one device, and whether its logit is highest for its own pair."""
    others_BE, valid_B = collectives.all_gather_rows(others), collectives.all_gather_rows(valid)

    @partial(jax.checkpoint, prevent_cse=False)
    def one_row(row):
        row_E, own = row
        with exact_products(row_E.dtype):
            logits_B = scale * (others_BE @ row_E) + bias
        loss = row_loss(logits_B, jnp.arange(logits_B.size) == own, valid_B)
        return loss, jnp.argmax(jnp.where(valid_B, logits_B, -jnp.inf)) == own

    return jax.lax.map(one_row, (rows, index), batch_size=-(-rows.shape[0] // chunks))
