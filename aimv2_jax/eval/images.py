"""Pictures of any kind, opened: images of Pillow's, arrays, files, and their bytes. H and W pixels."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from aimv2_jax.data import pictures
from aimv2_jax.data.inputs.files import MAX_FILE_BYTES
from aimv2_jax.data.records import BadRecord
from aimv2_jax.data.transforms import Box
from aimv2_jax.errors import UserError
from aimv2_jax.untrusted import read_file


@dataclasses.dataclass(frozen=True)
class NamedPicture:
    """A file's bytes, and what errors call it."""

    name: str
    data: bytes


_TOO_MUCH = {
    "oversized_image": "a picture has more pixels than are decoded",
    "costly_image": "a picture takes too long to decode for its pixels",
}

ImageLike = Image.Image | np.ndarray | str | Path | bytes | NamedPicture
"""A picture: an image of Pillow's, uint8 [H, W], [H, W, 3] or [H, W, 4], a file, or a file's bytes."""


@dataclasses.dataclass(frozen=True)
class OpenedImage:
    """A picture of `size` (width, height), of which no more is decoded than a crop needs (`pictures.Picture`)."""

    name: str
    size: tuple[int, int]
    picture: pictures.Picture | Image.Image

    def decode(self, box: Box, size: int | tuple[int, int]) -> tuple[Image.Image, Box]:
        """What it takes to scale `box` to `size`: an RGB image, and where in it the box lies.

        Raises:
          UserError: where it is damaged.
        """
        if isinstance(self.picture, Image.Image):
            return self.picture, box
        try:
            return self.picture.decode(box, size)
        except BadRecord as error:
            raise _no_picture(self.name, error) from error

    def whole(self) -> Image.Image:
        """All of it, in RGB; raises as `decode`."""
        if isinstance(self.picture, Image.Image):
            return self.picture
        try:
            return self.picture.whole()
        except BadRecord as error:
            raise _no_picture(self.name, error) from error


def open_image(image: ImageLike) -> OpenedImage:
    """Opens a picture.

    Raises:
      UserError: for what is none.
    """
    if isinstance(image, (str, Path)):
        return _opened(str(image), _read(image))
    if isinstance(image, NamedPicture):
        return _opened(image.name, image.data)
    if isinstance(image, bytes):
        return _opened(f"{len(image)} bytes", image)
    if isinstance(image, np.ndarray):
        fits = image.ndim == 2 or (image.ndim == 3 and image.shape[2] in (3, 4))
        if image.dtype != np.uint8 or not fits or not image.size:
            what = f"{image.dtype} of shape {image.shape}"
            raise UserError("an array that is no picture", what, "Give uint8 [height, width, 3], values 0 to 255")
        image = Image.fromarray(image)
    if not isinstance(image, Image.Image):
        remedy = "Give an image of Pillow's, a uint8 array, or a file's name"
        raise UserError("not a picture", type(image).__name__, remedy)
    try:
        seen = pictures.as_seen(image)
    except Exception as error:  # Of an image that Pillow has not read to its end: whatever its decoders raise.
        raise _no_picture(getattr(image, "filename", "") or type(image).__name__) from error
    return OpenedImage("an image", seen.size, seen)


def check_several(images: Any) -> None:
    """Raises `UserError` for one picture where a list of them is asked."""
    one = (Image.Image, str, Path, bytes, NamedPicture)
    if isinstance(images, one) or (isinstance(images, np.ndarray) and images.ndim < 4):
        raise UserError("one picture where a list is asked", type(images).__name__, "Give [picture]")


def _read(path: str | Path) -> bytes:
    try:
        return read_file(path, MAX_FILE_BYTES)
    except ValueError as error:
        raise UserError(
            f"not a picture that can be read, {error}", str(path), "Leave it out, or give a file"
        ) from error
    except OSError as error:
        why = error.strerror or type(error).__name__
        raise UserError(
            f"a picture cannot be read ({why})", str(path), "Give the name of a file that can be"
        ) from error


def _opened(name: str, data: bytes) -> OpenedImage:
    try:
        picture = pictures.open_picture(data)
    except BadRecord as error:
        raise _no_picture(name, error) from error
    return OpenedImage(name, picture.size, picture)


def _no_picture(name: str, error: BadRecord | None = None) -> UserError:
    if error is not None and error.reason in _TOO_MUCH:
        return UserError(_TOO_MUCH[error.reason], name, "Leave it out, or save it again, smaller")
    return UserError("not a picture that can be decoded", name, "Leave it out, or give JPEG, PNG, WebP, GIF or BMP")
