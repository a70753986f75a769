"""Opens images given as Pillow images, arrays, file names or encoded bytes. H and W pixels."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from aimv2_jax.data.records import BadRecord
from aimv2_jax.data.transforms import decode
from aimv2_jax.data.transforms.geometry import Box
from aimv2_jax.errors import UserError
from aimv2_jax.prepare.inputs.open_files import MAX_FILE_BYTES
from aimv2_jax.untrusted import read_file


@dataclasses.dataclass(frozen=True)
class NamedImage:
    """An encoded image's bytes, and its name in error messages."""

    name: str
    data: bytes


_LIMIT_ERRORS = {
    "oversized_image": "an image has more pixels than the decoder accepts",
    "costly_image": "an image takes too long to decode for its number of pixels",
}

ImageLike = Image.Image | np.ndarray | str | Path | bytes | NamedImage
"""An image: a Pillow image, uint8 [H, W], [H, W, 3] or [H, W, 4], a file name, or a file's bytes."""


@dataclasses.dataclass(frozen=True)
class OpenedImage:
    """An image of `size` (width, height) that decodes no more than a crop needs (`decode.EncodedImage`)."""

    name: str
    size: tuple[int, int]
    image: decode.EncodedImage | Image.Image

    def decode(self, box: Box, size: int | tuple[int, int]) -> tuple[Image.Image, Box]:
        """Decodes what is needed to scale `box` to `size`: an RGB image, and the box in its coordinates.

        Raises:
          UserError: for a damaged image.
        """
        if isinstance(self.image, Image.Image):
            return self.image, box
        try:
            return self.image.decode(box, size)
        except BadRecord as error:
            raise _not_an_image(self.name, error) from error

    def decode_full(self) -> Image.Image:
        """The whole image in RGB; raises as `decode` does."""
        if isinstance(self.image, Image.Image):
            return self.image
        try:
            return self.image.decode_full()
        except BadRecord as error:
            raise _not_an_image(self.name, error) from error


def open_image(image: ImageLike) -> OpenedImage:
    """Opens an image.

    Raises:
      UserError: for anything that is not an image.
    """
    if isinstance(image, (str, Path)):
        return _opened(str(image), _read(image))
    if isinstance(image, NamedImage):
        return _opened(image.name, image.data)
    if isinstance(image, bytes):
        return _opened(f"{len(image)} bytes", image)
    if isinstance(image, np.ndarray):
        fits = image.ndim == 2 or (image.ndim == 3 and image.shape[2] in (3, 4))
        if image.dtype != np.uint8 or not fits or not image.size:
            what = f"{image.dtype} of shape {image.shape}"
            raise UserError("the array is not an image", what, "Give uint8 [height, width, 3], values 0 to 255")
        image = Image.fromarray(image)
    if not isinstance(image, Image.Image):
        remedy = "Give a Pillow image, a uint8 array, or a file name"
        raise UserError("not an image", type(image).__name__, remedy)
    try:
        upright = decode.to_upright_rgb(image)
    except Exception as error:  # A lazily opened file is decoded here, and Pillow's decoders may raise anything.
        raise _not_an_image(getattr(image, "filename", "") or type(image).__name__) from error
    return OpenedImage("an image", upright.size, upright)


def check_image_list(images: Any) -> None:
    """Raises `UserError` for a single image in place of a list."""
    image_types = (Image.Image, str, Path, bytes, NamedImage)
    if isinstance(images, image_types) or (isinstance(images, np.ndarray) and images.ndim < 4):
        raise UserError("a single image in place of a list", type(images).__name__, "Give [image]")


def _read(path: str | Path) -> bytes:
    try:
        return read_file(path, MAX_FILE_BYTES)
    except ValueError as error:
        raise UserError(f"the image cannot be read: {error}", str(path), "Leave it out, or give a file") from error
    except OSError as error:
        why = error.strerror or type(error).__name__
        raise UserError(f"the image cannot be read ({why})", str(path), "Give a readable file") from error


def _opened(name: str, data: bytes) -> OpenedImage:
    try:
        image = decode.open_encoded(data)
    except BadRecord as error:
        raise _not_an_image(name, error) from error
    return OpenedImage(name, image.size, image)


def _not_an_image(name: str, error: BadRecord | None = None) -> UserError:
    if error is not None and error.reason in _LIMIT_ERRORS:
        return UserError(_LIMIT_ERRORS[error.reason], name, "Leave it out, or save a smaller copy")
    return UserError("not a decodable image", name, "Leave it out, or give JPEG, PNG, WebP, GIF or BMP")
