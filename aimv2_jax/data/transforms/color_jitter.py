"""Colour jitter: random brightness, contrast and saturation in a random order. Pillow."""

from __future__ import annotations

import dataclasses

from PIL import Image, ImageEnhance

from aimv2_jax.data.sampling.counter_rng import example_rng

_ENHANCERS = (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color)


@dataclasses.dataclass(frozen=True)
class ColorJitter:
    """Changes an RGB image as torchvision's `ColorJitter(strength, strength, strength)` does, without hue.

    Each factor is uniform in 1 - strength to 1 + strength, a function of (seed, example number).
    """

    seed: int
    strength: float

    def __call__(self, image: Image.Image, example: int) -> Image.Image:
        rng = example_rng(self.seed, "color_jitter", example)
        factors = rng.uniform(1 - self.strength, 1 + self.strength, size=len(_ENHANCERS))
        for index in rng.permutation(len(_ENHANCERS)):
            image = _ENHANCERS[index](image).enhance(float(factors[index]))
        return image
