"""RandAugment (arXiv 1909.13719) with the operations and ranges of timm's `rand-m9-mstd0.5-inc1`. Pillow.

Random numbers are a function of (seed, example number). The magnitude of an operation is in 0 to 10; a greater one
changes the image more. An operation of two directions takes one of them at random.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from PIL import Image, ImageEnhance, ImageOps

from aimv2_jax.data.sampling.counter_rng import example_rng

Color = tuple[int, int, int]
MAX_MAGNITUDE = 10.0
_MAX_DEGREES = 30.0
_MAX_SHEAR = 0.3
_MAX_TRANSLATION = 0.45  # Share of the image's side.
_MAX_ENHANCEMENT = 0.9  # Farthest that a factor of contrast, color, ... is from 1, which changes nothing.
_MIN_FACTOR = 0.1
_BITS = 4  # Bits of a color that posterising keeps at magnitude 0.
_MAX_ADDED, _ADDED_LIMIT, _ADDED_BELOW = 110, 128, 128  # Solarize-add brightens colors below 128.


@dataclasses.dataclass(frozen=True)
class Step:
    """One operation on an image: its name in `OPERATIONS`, its magnitude, and +1 or -1 for its direction."""

    operation: str
    magnitude: float
    direction: int

    def __call__(self, image: Image.Image, fill: Color) -> Image.Image:
        """The changed RGB image; pixels that come from outside of it get the colour `fill`."""
        return OPERATIONS[self.operation](image, self.magnitude / MAX_MAGNITUDE, self.direction, fill)


@dataclasses.dataclass(frozen=True)
class RandAugment:
    """Applies up to `count` random operations to an RGB image.

    Args:
      seed: seed of the run.
      fill: colour of pixels that come from outside of the image.
      magnitude: mean of an operation's magnitude, which is normal and clipped to 0 to 10.
      magnitude_std: its standard deviation.
      count: operations drawn for an image, with replacement.
      probability: that a drawn operation is applied.
    """

    seed: int
    fill: Color
    magnitude: float = 9.0
    magnitude_std: float = 0.5
    count: int = 2
    probability: float = 0.5

    def steps(self, example: int) -> list[Step]:
        """The operations that are applied to the image of an example, in order."""
        rng = example_rng(self.seed, "rand_augment", example)
        names = list(OPERATIONS)
        drawn = rng.integers(len(names), size=self.count)
        applied = rng.random(self.count) < self.probability
        magnitudes = (self.magnitude + self.magnitude_std * rng.standard_normal(self.count)).clip(0, MAX_MAGNITUDE)
        directions = 1 - 2 * rng.integers(2, size=self.count)
        steps = zip(drawn, applied, magnitudes, directions)
        return [Step(names[op], float(magnitude), int(sign)) for op, used, magnitude, sign in steps if used]

    def __call__(self, image: Image.Image, example: int) -> Image.Image:
        for step in self.steps(example):
            image = step(image, self.fill)
        return image


def _affine(image: Image.Image, matrix: tuple[float, ...], fill: Color) -> Image.Image:
    return image.transform(
        image.size, Image.Transform.AFFINE, matrix, resample=Image.Resampling.BICUBIC, fillcolor=fill
    )


def _rotate(image: Image.Image, share: float, direction: int, fill: Color) -> Image.Image:
    degrees = direction * share * _MAX_DEGREES
    return image.rotate(degrees, resample=Image.Resampling.BICUBIC, fillcolor=fill)


def _shear_x(image: Image.Image, share: float, direction: int, fill: Color) -> Image.Image:
    return _affine(image, (1, direction * share * _MAX_SHEAR, 0, 0, 1, 0), fill)


def _shear_y(image: Image.Image, share: float, direction: int, fill: Color) -> Image.Image:
    return _affine(image, (1, 0, 0, direction * share * _MAX_SHEAR, 1, 0), fill)


def _translate_x(image: Image.Image, share: float, direction: int, fill: Color) -> Image.Image:
    return _affine(image, (1, 0, direction * share * _MAX_TRANSLATION * image.width, 0, 1, 0), fill)


def _translate_y(image: Image.Image, share: float, direction: int, fill: Color) -> Image.Image:
    return _affine(image, (1, 0, 0, 0, 1, direction * share * _MAX_TRANSLATION * image.height), fill)


def _posterize(image: Image.Image, share: float, direction: int, fill: Color) -> Image.Image:
    return ImageOps.posterize(image, _BITS - int(share * _BITS))  # At magnitude 10 the image is black, as in timm.


def _solarize(image: Image.Image, share: float, direction: int, fill: Color) -> Image.Image:
    return ImageOps.solarize(image, 256 - int(share * 256))


def _solarize_add(image: Image.Image, share: float, direction: int, fill: Color) -> Image.Image:
    added = min(_ADDED_LIMIT, int(share * _MAX_ADDED))
    table = [min(255, color + added) if color < _ADDED_BELOW else color for color in range(256)]
    return image.point(table * len(image.getbands()))


def _enhanced(enhancer: Callable[[Image.Image], ImageEnhance._Enhance]) -> Callable[..., Image.Image]:
    def enhance(image: Image.Image, share: float, direction: int, fill: Color) -> Image.Image:
        return enhancer(image).enhance(max(_MIN_FACTOR, 1 + direction * (share * _MAX_ENHANCEMENT)))

    return enhance


OPERATIONS: dict[str, Callable[[Image.Image, float, int, Color], Image.Image]] = {
    "auto_contrast": lambda image, share, direction, fill: ImageOps.autocontrast(image),
    "equalize": lambda image, share, direction, fill: ImageOps.equalize(image),
    "invert": lambda image, share, direction, fill: ImageOps.invert(image),
    "rotate": _rotate,
    "posterize": _posterize,
    "solarize": _solarize,
    "solarize_add": _solarize_add,
    "color": _enhanced(ImageEnhance.Color),
    "contrast": _enhanced(ImageEnhance.Contrast),
    "brightness": _enhanced(ImageEnhance.Brightness),
    "sharpness": _enhanced(ImageEnhance.Sharpness),
    "shear_x": _shear_x,
    "shear_y": _shear_y,
    "translate_x": _translate_x,
    "translate_y": _translate_y,
}
"""Name -> operation on (image, magnitude / 10, direction, fill)."""
