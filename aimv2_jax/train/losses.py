"""Targets and losses as sums and counts, and what is drawn for them.

B batch, L patches, M = L - 1, K kept rows, P pixels a patch, T text, V vocabulary.

All in float32. Only the step divides a sum by its count, after both are global (LAYOUT.md, "Losses").
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, UInt, UInt8


def normalise_pixels(
    patches: UInt8[Array, "B L P"], valid: Bool[Array, "B L"], mean: Sequence[float], std: Sequence[float]
) -> Float[Array, "B L P"]:
    """(pixel / 255 - mean) / std by channel (the fastest axis of P); padding becomes 0."""
    repeats = patches.shape[-1] // len(mean)
    mean_P, std_P = (jnp.tile(jnp.asarray(values, jnp.float32), repeats) for values in (mean, std))
    return jnp.where(valid[..., None], (patches.astype(jnp.float32) / 255 - mean_P) / std_P, 0)


def patch_targets(pixels: Float[Array, "B L P"], eps: float) -> Float[Array, "B L P"]:
    """Each patch minus its mean, over sqrt(unbiased variance + eps) (RECIPE.md §4)."""
    centred = pixels - jnp.mean(pixels, axis=-1, keepdims=True)
    variance = jnp.sum(jnp.square(centred), axis=-1, keepdims=True) / (pixels.shape[-1] - 1)
    return centred * jax.lax.rsqrt(variance + eps)


def counted_patches(prefix: Int[Array, " B"], valid: Bool[Array, "B L"]) -> Bool[Array, "B L"]:
    """Patches whose prediction is scored: outside the prefix, never patch 0, valid."""
    index_L = jnp.arange(valid.shape[1])
    return (index_L >= jnp.maximum(prefix, 1)[:, None]) & valid


def counted_tokens(
    token_valid: Bool[Array, "B T"], is_example: Bool[Array, " B"], predict_eos: bool
) -> Bool[Array, "B T"]:
    """Tokens whose prediction is scored: the text, and with `predict_eos` the first position after it.

    An example without text ends at position 0. A row that is no example but filling has no end.
    """
    if not predict_eos:
        return token_valid
    text_before = jnp.roll(token_valid, 1, axis=1).at[:, 0].set(is_example)
    return token_valid | (text_before & ~token_valid)


def image_loss_sum(
    predicted: Float[Array, "B M P"], targets: Float[Array, "B L P"], counted: Bool[Array, "B L"]
) -> Float[Array, ""]:
    """Sum over counted patches of the mean squared error of row i-1 against patch i."""
    error_BL = jnp.mean(jnp.square(predicted - targets[:, 1:]), axis=-1)
    return jnp.sum(jnp.where(counted[:, 1:], error_BL, 0))


def text_loss_sum(
    logits: Float[Array, "B T V"], tokens: Int[Array, "B T"], counted: Bool[Array, "B T"]
) -> Float[Array, ""]:
    """Sum of the cross-entropy over counted tokens."""
    # Picked by a comparison, not by a gather: it rides on the pass over the logits that sums their exponentials.
    is_target = tokens[..., None] == jnp.arange(logits.shape[-1])
    losses_BT = jax.nn.logsumexp(logits, axis=-1) - jnp.sum(logits, axis=-1, where=is_target)
    return jnp.sum(jnp.where(counted, losses_BT, 0))


def draw_prefix(rng: jax.Array, example_index: UInt[Array, "B 2"], valid: Bool[Array, "B L"]) -> Int[Array, " B"]:
    """Prefix lengths, uniform on {1 … n-1} for n valid patches, each a function of (rng, example number) alone.

    An example with fewer than two valid patches gets 1, and counts nothing.
    """

    def draw(index_2, num_valid):
        return jax.random.randint(_example_key(rng, index_2), (), 1, jnp.maximum(num_valid, 2))

    return jax.vmap(draw)(example_index, jnp.sum(valid, axis=1))


def draw_rows(
    rng: jax.Array, example_index: UInt[Array, "B 2"], valid: Bool[Array, "B L"], count: int
) -> Int[Array, "B {count}"]:
    """`count` rows of each example in rising order, each set of them as likely, a function of (rng, example number).

    Rows of padding are taken only where the valid ones are too few.
    """

    def draw(index_2, valid_L):
        lots = jax.random.uniform(_example_key(rng, index_2), valid_L.shape)
        chosen_K = jnp.argsort(jnp.where(valid_L, lots, 1 + lots))[:count]
        return jnp.sort(chosen_K)

    return jax.vmap(draw)(example_index, valid)


def _example_key(rng: jax.Array, index_2: UInt[Array, " 2"]) -> jax.Array:
    return jax.random.fold_in(jax.random.fold_in(rng, index_2[0]), index_2[1])


def divide(total: Float[Array, ""], count: Float[Array, ""] | Int[Array, ""]) -> Float[Array, ""]:
    """total / count, and 0 where nothing was counted."""
    return total / jnp.maximum(count, 1)
