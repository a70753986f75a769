"""Photographs of the bundled sample as files with many sizes, aspects, modes and formats."""

import io
from pathlib import Path

import numpy as np
from PIL import Image

from aimv2_jax.data import records
from aimv2_jax.data.sources import Source

# (width, height): odd and even, wide and tall, tiny, with the input side of models, and with 1 to 5 pixels to crop.
SIZES = [(640, 480), (427, 640), (301, 200), (199, 333), (224, 224), (57, 56), (59, 56), (56, 61), (500, 31)]
SIZES += [(17, 700), (90, 30), (1, 1), (2, 3), (1200, 400), (450, 449), (56, 56), (113, 226), (3, 400)]
EXIF_ORIENTATION = 0x0112


def write_images(folder: Path, count: int) -> list[Path]:
    """Writes the first `count` photographs of the training sample, each in another format, and returns their paths."""
    source = Source("photo", "package:data/sample/train/photo")
    paths = []
    for number in range(count):
        image = Image.open(io.BytesIO(records.decode(source.read(number)).image)).convert("RGB")
        if number % 3:  # The others keep their size.
            image = image.resize(SIZES[number % len(SIZES)])
        suffix, save = ENCODERS[number % len(ENCODERS)]
        paths.append(folder / f"{number:03}.{suffix}")
        save(image, paths[-1])
    return paths


def _jpeg(mode="RGB", orientation=1, **options):
    def save(image, path):
        exif = Image.Exif()
        exif[EXIF_ORIENTATION] = orientation
        image.convert(mode).save(path, "JPEG", exif=exif, **options)

    return "jpg", save


def _as(format, mode, **options):
    return format.lower(), lambda image, path: image.convert(mode).save(path, format, **options)


def _with_alpha(format, mode, **options):
    """Alpha from 0 to 255 across the image."""

    def save(image, path):
        alpha = np.linspace(0, 255, image.width).astype(np.uint8)[None].repeat(image.height, 0)
        image = image.convert("RGB")
        image.putalpha(Image.fromarray(alpha))
        image.convert(mode).save(path, format, **options)

    return format.lower(), save


def _palette(format, **options):
    return format.lower(), lambda image, path: image.quantize(64).save(path, format, **options)


ENCODERS = [
    _jpeg(quality=90),
    _jpeg(quality=75, subsampling=0, orientation=6),
    _jpeg(quality=60, subsampling=1, orientation=3),
    _jpeg(quality=85, progressive=True, orientation=8),
    _jpeg(quality=95, keep_rgb=True),
    _jpeg("L", quality=80, orientation=5),
    _jpeg("CMYK", quality=90, orientation=2),
    _jpeg(quality=50, restart_marker_rows=1, orientation=7),
    _as("PNG", "RGB"),
    _as("PNG", "L"),
    _as("PNG", "1"),
    _with_alpha("PNG", "RGBA"),
    _with_alpha("PNG", "LA"),
    _palette("PNG"),
    _palette("PNG", transparency=3),
    _palette("PNG", transparency=bytes(range(0, 256, 4))),
    _as("PNG", "RGB", transparency=(0, 0, 0)),
    _as("WEBP", "RGB", quality=80),
    _with_alpha("WEBP", "RGBA", lossless=True),
    _palette("GIF"),
    _palette("GIF", transparency=5),
    _as("BMP", "RGB"),
    _as("BMP", "RGBA"),
]
