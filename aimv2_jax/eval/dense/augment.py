"""Random colours of train images, on the devices. B batch, L patches, P values of a patch."""

from __future__ import annotations

from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, UInt8

_GREY = (0.299, 0.587, 0.114)


def random_colours(
    rng: jax.Array, patches: UInt8[Array, "B L P"], kind: Literal["none", "photometric", "gamma"]
) -> UInt8[Array, "B L P"]:
    """Changes the colours of each image.

    Args:
      rng: of the batch.
      patches: RGB, the channel is the fastest axis.
      kind: "photometric" as for SSD and ADE20k: brightness, contrast, saturation and hue, each with probability 0.5;
        "gamma" as for AdaBins and NYUv2: with probability 0.5 a gamma of 0.9 to 1.1, brightness of 0.75 to 1.25, and
        each channel times 0.9 to 1.1; "none" changes nothing.
    """
    if kind == "none":
        return patches
    values = patches.astype(jnp.float32).reshape(len(patches), -1, 3)
    values = (_photometric if kind == "photometric" else _gamma)(rng, values)
    return jnp.round(values).astype(jnp.uint8).reshape(patches.shape)


def _photometric(rng: jax.Array, values: Float[Array, "B M 3"]) -> Float[Array, "B M 3"]:
    keys = iter(jax.random.split(rng, 9))

    def draw(low: float, high: float) -> Array:
        return jax.random.uniform(next(keys), (len(values), 1, 1), minval=low, maxval=high)

    def chosen() -> Array:
        return jax.random.bernoulli(next(keys), shape=(len(values), 1, 1))

    values = jnp.where(chosen(), (values + draw(-32.0, 32.0)).clip(0, 255), values)
    contrast, first = jnp.where(chosen(), draw(0.5, 1.5), 1.0), chosen()
    values = jnp.where(first, (values * contrast).clip(0, 255), values)
    grey = values @ jnp.array(_GREY)[:, None]
    saturation = jnp.where(chosen(), draw(0.5, 1.5), 1.0)
    values = (grey + (values - grey) * saturation).clip(0, 255)
    values = shift_hue(values, jnp.where(chosen(), draw(-0.5, 0.5), 0.0)[:, 0, 0])
    return jnp.where(first, values, (values * contrast).clip(0, 255))


def shift_hue(values: Float[Array, "B M 3"], shift: Float[Array, B]) -> Float[Array, "B M 3"]:  # noqa: F821
    """Turns the hue of HSV by `shift` circles."""
    red, green, blue = values[..., 0], values[..., 1], values[..., 2]
    most, chroma = values.max(-1), values.max(-1) - values.min(-1)
    safe = jnp.where(chroma > 0, chroma, 1)
    sector = jnp.where(
        most == red,
        (green - blue) / safe,
        jnp.where(most == green, (blue - red) / safe + 2, (red - green) / safe + 4),
    )
    hue = jnp.where(chroma > 0, sector, 0) + 6 * shift[:, None]
    # The value of a channel falls from `most` by the chroma, as far as the hue is from it (channels 0, 2 and 4).
    offsets = jnp.mod(hue[..., None] + jnp.array([5.0, 3.0, 1.0]), 6)
    return most[..., None] - chroma[..., None] * jnp.clip(jnp.minimum(offsets, 4 - offsets), 0, 1)


def _gamma(rng: jax.Array, values: Float[Array, "B M 3"]) -> Float[Array, "B M 3"]:
    keys, count = jax.random.split(rng, 4), len(values)
    gamma = jax.random.uniform(keys[0], (count, 1, 1), minval=0.9, maxval=1.1)
    brightness = jax.random.uniform(keys[1], (count, 1, 1), minval=0.75, maxval=1.25)
    colours = jax.random.uniform(keys[2], (count, 1, 3), minval=0.9, maxval=1.1)
    changed = (values**gamma * brightness * colours).clip(0, 255)
    return jnp.where(jax.random.bernoulli(keys[3], shape=(count, 1, 1)), changed, values)
