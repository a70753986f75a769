"""How a model sees an image: a centre square, a random crop or the whole image, resized once."""

from __future__ import annotations

import dataclasses

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from aimv2_jax.data.sampling.counter_rng import example_rng
from aimv2_jax.data.transforms import geometry
from aimv2_jax.data.transforms.decode import EncodedImage
from aimv2_jax.data.transforms.geometry import Box
from aimv2_jax.data.transforms.resampling import Canvas, Unresized, unresized

Size = tuple[int, int]
"""(width, height) of an image."""


@dataclasses.dataclass(frozen=True)
class View:
    """The part of an image that a model gets: `view(image)` gives its pixels, in two steps that can be timed.

    Args:
      size: of the result: (width, height), or a square's side.
      box: the part of the image, see `geometry.resize`; None: the centre square, see `geometry.center_view`.
      mirrored: whether the part is flipped left to right.
    """

    size: int | Size
    box: Box | None = None
    mirrored: bool = False

    def resized(self, size: int) -> View:
        """The same part of the image in a square of side `size`."""
        return dataclasses.replace(self, size=size)

    def pixels(self) -> int:
        """Number of pixels of the result."""
        width, height = geometry.sides(self.size)
        return width * height

    def decode(self, image: EncodedImage) -> tuple[Image.Image, Box | None]:
        """Decodes what `resize` needs, with the errors of the image, which may also be an `OpenedImage`."""
        return (image.decode_full(), None) if self.box is None else image.decode(self.box, self.size)

    def resize(self, decoded: tuple[Image.Image, Box | None]) -> UInt8[np.ndarray, "H W 3"]:
        """The pixels from the result of `decode`."""
        image, box = decoded
        if box is None:
            return geometry.center_view(image, self.size)
        return geometry.resize(image, box, self.size, self.mirrored)

    def __call__(self, image: EncodedImage) -> UInt8[np.ndarray, "H W 3"]:
        return self.resize(self.decode(image))

    def unresized(self, image: EncodedImage, canvas: Canvas) -> Unresized:
        """The same pixels, still to be resized by a device that takes `canvas`."""
        return unresized(*self.decode(image), self.size, self.mirrored, canvas)


def whole_image(image_size: Size, patch_size: int, max_patches: int, upscale: bool, mirrored: bool = False) -> View:
    """Native resolution: the whole image with its aspect, in at most `max_patches` patches.

    Without `upscale`, it is in no more patches than it has pixels for.
    """
    width, height = image_size
    if not upscale:
        max_patches = min(max_patches, max(1, width * height // patch_size**2))
    rows, columns = geometry.fit_grid(width, height, max_patches)
    return View((columns * patch_size, rows * patch_size), (0, 0, width, height), mirrored)


def evaluation_view(image_size: Size, size: int, patch_size: int, area: int | None, upscale: bool) -> View:
    """The centre square at `size`, or with `area` the whole image in at most `area` patches."""
    return View(size) if area is None else whole_image(image_size, patch_size, area, upscale)


@dataclasses.dataclass(frozen=True)
class RandomCrop:
    """Random crop and flip of a training image, a function of the example number; `flip` is the flip's probability."""

    seed: int
    size: int
    area: tuple[float, float]
    ratio: tuple[float, float]
    flip: float

    def __call__(self, image_size: Size, example: int) -> View:
        box = geometry.crop_box(example_rng(self.seed, "crop", example), *image_size, self.area, self.ratio)
        return View(self.size, box, is_flipped(self.seed, example, self.flip))


@dataclasses.dataclass(frozen=True)
class RandomFlip:
    """The whole training image (`whole_image`), flipped with probability `flip` by the example number."""

    seed: int
    patch_size: int
    max_patches: int
    upscale: bool
    flip: float

    def __call__(self, image_size: Size, example: int) -> View:
        mirrored = is_flipped(self.seed, example, self.flip)
        return whole_image(image_size, self.patch_size, self.max_patches, self.upscale, mirrored)


def is_flipped(seed: int, example: int, probability: float) -> bool:
    """Whether the image of an example is flipped left to right."""
    return example_rng(seed, "flip", example).random() < probability
