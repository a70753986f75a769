"""Losses of a student against a teacher, as sums over rows.

B batch, L patches, M = L - 1, S patches of the teacher's grid, E teacher width, P pixels a patch, T text, V vocabulary.

All losses are float32, and 0 where student and teacher agree. Their counts are those of the masks.
"""

from __future__ import annotations

from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

FeatureLoss = Literal["cosine", "l2"]

_MIN_SQUARED_NORM = 1e-12  # Keeps the gradient of a row of zeros finite.


def feature_loss_sum(
    student: Float[Array, "B L E"], teacher: Float[Array, "B L E"], valid: Bool[Array, "B L"], kind: FeatureLoss
) -> Float[Array, ""]:
    """Sums over valid patches 1 - cos of the angle between both features, or the mean squared difference ("l2")."""
    student, teacher = student.astype(jnp.float32), teacher.astype(jnp.float32)
    if kind == "cosine":  # 1 - u · v of unit vectors is |u - v|² / 2, which has no rounding error where u = v.
        loss_BL = jnp.sum(jnp.square(_unit(student) - _unit(teacher)), axis=-1) / 2
    else:
        loss_BL = jnp.mean(jnp.square(student - teacher), axis=-1)
    return jnp.sum(jnp.where(valid, loss_BL, 0))


def _unit(x: Float[Array, "B L E"]) -> Float[Array, "B L E"]:
    squared_norm = jnp.sum(jnp.square(x), axis=-1, keepdims=True)
    return x * jax.lax.rsqrt(jnp.maximum(squared_norm, _MIN_SQUARED_NORM))


def logit_loss_sum(
    student: Float[Array, "B T V"], teacher: Float[Array, "B T V"], loss_mask: Bool[Array, "B T"], temperature: float
) -> Float[Array, ""]:
    """Sums KL(teacher || student) of the softmax at `temperature`, times its square, over the tokens of `loss_mask`.

    The square keeps the gradient's size independent of the temperature (Hinton et al., arXiv 1503.02531).
    """
    log_p, log_q = (jax.nn.log_softmax(logits / temperature) for logits in (teacher, student))
    divergence_BT = jnp.sum(jnp.exp(log_p) * (log_p - log_q), axis=-1)
    return temperature**2 * jnp.sum(jnp.where(loss_mask, divergence_BT, 0))


def pixel_loss_sum(
    student: Float[Array, "B M P"], teacher: Float[Array, "B M P"], loss_mask: Bool[Array, "B L"]
) -> Float[Array, ""]:
    """Sums the mean squared difference of the predictions of patches 1 … L-1 over the patches of `loss_mask`."""
    error_BM = jnp.mean(jnp.square(student - teacher), axis=-1)
    return jnp.sum(jnp.where(loss_mask[:, 1:], error_BM, 0))


def resize_features(
    features: Float[Array, "B S E"], grid: tuple[int, int], new_grid: tuple[int, int]
) -> Float[Array, "B L E"]:
    """Resizes features from one grid of (rows, columns) to another: bilinear, antialiased where it shrinks, float32."""
    batch, _, width = features.shape
    features = features.astype(jnp.float32).reshape(batch, *grid, width)
    return jax.image.resize(features, (batch, *new_grid, width), "bilinear").reshape(batch, -1, width)


def resize_prefix(prefix: Int[Array, " B"], length: int, new_length: int) -> Int[Array, " B"]:
    """Prefix lengths with the same share of `new_length` patches as `prefix` has of `length`, rounded, at least 1."""
    return jnp.maximum(1, (prefix * new_length + length // 2) // length)
