"""Masks and depth maps: exact values, and a reason for everything else."""

from __future__ import annotations

import io
import zlib

import numpy as np
import pytest
from PIL import Image

from aimv2_jax.data.records import BadRecord
from aimv2_jax.data.transforms.maps import decode_map


def png(pixels, mode=None, format="PNG", **options) -> bytes:
    file = io.BytesIO()
    image = Image.fromarray(pixels)
    if mode is not None:
        image = image.convert(mode)
    image.save(file, format, **options)
    return file.getvalue()


RAMP = np.arange(256, dtype=np.uint8).reshape(8, 32)


def test_map_of_8_bits_has_the_values_stored():
    """All 256 values of an 8-bit grey PNG come back as uint8."""
    decoded = decode_map(png(RAMP))
    assert decoded.dtype == np.uint8 and np.array_equal(decoded, RAMP)


def test_map_of_16_bits_is_not_reduced_to_8():
    """Neighbouring 16-bit values stay distinct, over the whole range."""
    pixels = np.linspace(0, 65535, 40 * 50).round().astype(np.uint16).reshape(40, 50)
    decoded = decode_map(png(pixels))
    assert decoded.dtype == np.uint16 and np.array_equal(decoded, pixels)


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_map_with_a_palette_gives_its_indices(bits):
    """The indices of a palette are the values, at any number of bits, and its colours are not."""
    indices = np.random.default_rng(bits).integers(0, 2**bits, (5, 9), np.uint8)
    image = Image.fromarray(indices, "P")
    image.putpalette(list(range(255, 255 - 3 * 2**bits, -1))[: 3 * 2**bits] if bits < 8 else [7, 8, 9] * 256)
    file = io.BytesIO()
    image.save(file, "PNG", bits=bits, transparency=0)
    decoded = decode_map(file.getvalue())
    assert decoded.dtype == np.uint8 and np.array_equal(decoded, indices)


def test_map_of_one_bit_gives_0_and_1():
    """A one-bit mask has the values 0 and 1, as numpy has them of Pillow's image."""
    mask = np.random.default_rng(0).integers(0, 2, (11, 13)).astype(bool)
    decoded = decode_map(png(mask))
    assert decoded.dtype == np.uint8 and np.array_equal(decoded, mask)


def test_map_with_an_exif_rotation_is_as_stored():
    """An EXIF orientation does not rotate the values."""
    exif = Image.Exif()
    exif[0x0112] = 6
    assert np.array_equal(decode_map(png(RAMP, exif=exif)), RAMP)


COLOURS = np.random.default_rng(1).integers(0, 256, (8, 8, 3), np.uint8)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "empty_map"),
        (png(COLOURS), "map_with_colours"),
        (png(COLOURS, "RGBA"), "map_with_colours"),
        (png(RAMP, "LA"), "map_with_colours"),
        (png(RAMP, format="JPEG"), "map_not_png"),
        (png(RAMP, format="WEBP", lossless=True), "map_not_png"),
        (png(RAMP)[:-30], "undecodable_map"),
        (png(RAMP)[:20], "undecodable_map"),
        (b"\x89PNG\r\n\x1a\n" + 100 * b"\0", "undecodable_map"),
    ],
    ids=["empty", "rgb", "rgba", "alpha", "jpeg", "webp", "cut", "header_cut", "garbage"],
)
def test_map_that_is_no_map_names_its_reason(data, reason):
    """Colours, lossy files and damaged files have reasons of their own."""
    with pytest.raises(BadRecord, match=f"^{reason}$"):
        decode_map(data)


def test_map_with_too_many_pixels_is_not_decoded():
    """The limit is that of images: a bomb of a few kilobytes is refused by its header."""
    header = bytearray(png(np.zeros((1, 1), np.uint8)))
    header[16:24] = (60_000).to_bytes(4, "big") * 2
    header[29:33] = zlib.crc32(header[12:29]).to_bytes(4, "big")
    with pytest.raises(BadRecord, match=r"^oversized_map$"):
        decode_map(bytes(header))
