"""Targets, losses as sums and counts, and sampling of prefixes and kept rows.

B batch, L patches, M = L - 1, K kept rows, P pixels a patch, T text, V vocabulary.

All losses are float32. Only the train step divides a sum by its count, after both are global (docs/architecture.md,
"Losses").
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, UInt, UInt8


def normalise_pixels(
    patches: UInt8[Array, "B L P"], valid: Bool[Array, "B L"], mean: Sequence[float], std: Sequence[float]
) -> Float[Array, "B L P"]:
    """Computes (pixel / 255 - mean) / std by channel (the fastest axis of P); padding becomes 0."""
    repeats = patches.shape[-1] // len(mean)
    mean_P, std_P = (jnp.tile(jnp.asarray(values, jnp.float32), repeats) for values in (mean, std))
    return jnp.where(valid[..., None], (patches.astype(jnp.float32) / 255 - mean_P) / std_P, 0)


def patch_targets(pixels: Float[Array, "B L P"], eps: float) -> Float[Array, "B L P"]:
    """Normalises each patch: minus its mean, over sqrt(unbiased variance + eps) (RECIPE.md §4)."""
    centred = pixels - jnp.mean(pixels, axis=-1, keepdims=True)
    variance = jnp.sum(jnp.square(centred), axis=-1, keepdims=True) / (pixels.shape[-1] - 1)
    return centred * jax.lax.rsqrt(variance + eps)


def image_loss_mask(prefix: Int[Array, " B"], valid: Bool[Array, "B L"]) -> Bool[Array, "B L"]:
    """Mask of the patches whose prediction is scored: valid, outside the prefix, never patch 0."""
    index_L = jnp.arange(valid.shape[1])
    return (index_L >= jnp.maximum(prefix, 1)[:, None]) & valid


def text_loss_mask(
    token_valid: Bool[Array, "B T"], is_example: Bool[Array, " B"], predict_eos: bool
) -> Bool[Array, "B T"]:
    """Mask of the tokens whose prediction is scored: the text, and with `predict_eos` the first position after it.

    The end of an example without text is at position 0. A padding row of the batch has no end.
    """
    if not predict_eos:
        return token_valid
    text_before = jnp.roll(token_valid, 1, axis=1).at[:, 0].set(is_example)
    return token_valid | (text_before & ~token_valid)


def image_loss_sum(
    predicted: Float[Array, "B M P"], targets: Float[Array, "B L P"], loss_mask: Bool[Array, "B L"]
) -> Float[Array, ""]:
    """Sums the mean squared error of row i-1 against patch i over the patches of `loss_mask`."""
    error_BL = jnp.mean(jnp.square(predicted - targets[:, 1:]), axis=-1)
    return jnp.sum(jnp.where(loss_mask[:, 1:], error_BL, 0))


def text_loss_sum(
    logits: Float[Array, "B T V"], tokens: Int[Array, "B T"], loss_mask: Bool[Array, "B T"]
) -> Float[Array, ""]:
    """Sums the cross-entropy over the tokens of `loss_mask`."""
    # A comparison instead of a gather fuses into the pass over the logits that computes logsumexp.
    is_target = tokens[..., None] == jnp.arange(logits.shape[-1])
    losses_BT = jax.nn.logsumexp(logits, axis=-1) - jnp.sum(logits, axis=-1, where=is_target)
    return jnp.sum(jnp.where(loss_mask, losses_BT, 0))


def sample_prefix(rng: jax.Array, example_index: UInt[Array, "B 2"], valid: Bool[Array, "B L"]) -> Int[Array, " B"]:
    """Samples prefix lengths, uniform on {1 … n-1} for n valid patches, each a function of (rng, example index).

    An example with fewer than two valid patches gets 1, and no patch of it is scored.
    """

    def draw(index_2, num_valid):
        return jax.random.randint(_example_key(rng, index_2), (), 1, jnp.maximum(num_valid, 2))

    return jax.vmap(draw)(example_index, jnp.sum(valid, axis=1))


def sample_rows(
    rng: jax.Array, example_index: UInt[Array, "B 2"], valid: Bool[Array, "B L"], count: int
) -> Int[Array, "B {count}"]:
    """Samples `count` distinct rows of each example uniformly, ascending, as a function of (rng, example index).

    Padding rows are used only if there are too few valid ones.
    """

    def draw(index_2, valid_L):
        scores = jax.random.uniform(_example_key(rng, index_2), valid_L.shape)
        chosen_K = jnp.argsort(jnp.where(valid_L, scores, 1 + scores))[:count]
        return jnp.sort(chosen_K)

    return jax.vmap(draw)(example_index, valid)


def _example_key(rng: jax.Array, index_2: UInt[Array, " 2"]) -> jax.Array:
    return jax.random.fold_in(jax.random.fold_in(rng, index_2[0]), index_2[1])


def safe_divide(total: Float[Array, ""], count: Float[Array, ""] | Int[Array, ""]) -> Float[Array, ""]:
    """Returns total / count; 0 if both are 0."""
    return total / jnp.maximum(count, 1)
