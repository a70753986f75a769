"""The quick reader of JPEG headers gives Pillow's size or leaves a file to Pillow."""

import io
import random
import warnings

import numpy as np
import pytest
from PIL import Image

from aimv2_jax.data.records import BadRecord
from aimv2_jax.data.transforms import decode
from aimv2_jax.data.transforms.jpeg_header import plain_jpeg_size

SIZE = 40, 24


def jpeg(mode="RGB", size=SIZE, **options):
    buffer = io.BytesIO()
    pixels = np.random.default_rng(0).integers(0, 256, (*size[::-1], 3), np.uint8)
    Image.fromarray(pixels).convert(mode).save(buffer, "JPEG", **options)
    return buffer.getvalue()


def exif(orientation):
    block = Image.Exif()
    block[274] = orientation
    return block.tobytes()


PLAIN = {
    "RGB": jpeg(),
    "grey": jpeg("L"),
    "colour profile": jpeg(icc_profile=bytes(70_000)),
    "comment": jpeg(comment=b"made by hand"),
    "restarts": jpeg(restart_marker_rows=1),
    "no subsampling": jpeg(subsampling=0, quality=95),
}
OTHERS = {
    "progressive": jpeg(progressive=True),
    "CMYK": jpeg("CMYK"),
    "EXIF": jpeg(exif=exif(6)),
    "XMP": jpeg(xmp=b'<x:xmpmeta><rdf:Description tiff:Orientation="6"/></x:xmpmeta>'),
    "fill bytes": PLAIN["RGB"].replace(b"\xff\xc0", b"\xff\xff\xc0"),
    "comments without end": b"\xff\xd8" + b"\xff\xfe\0\x02" * 1000 + PLAIN["RGB"][2:],
    "cut in the header": PLAIN["RGB"][:100],
    "cut at the scan": PLAIN["RGB"][: PLAIN["RGB"].index(b"\xff\xda") + 4],
    "no frame": PLAIN["RGB"].replace(b"\xff\xc0", b"\xff\xfe"),
    "12 bits": PLAIN["RGB"].replace(b"\xff\xc0\0\x11\x08", b"\xff\xc0\0\x11\x0c"),
    "no width": PLAIN["RGB"].replace(b"\x08\0\x18\0\x28", b"\x08\0\x18\0\0"),
    "one scan a component": PLAIN["RGB"].replace(b"\xff\xda\0\x0c\x03", b"\xff\xda\0\x08\x01"),
    "PNG": b"\x89PNG\r\n\x1a\n",
    "empty": b"",
}


@pytest.mark.parametrize("kind", PLAIN)
def test_size_of_a_plain_jpeg(kind):
    """A plain JPEG's size is read without Pillow."""
    assert plain_jpeg_size(PLAIN[kind]) == SIZE


@pytest.mark.parametrize("kind", OTHERS)
def test_size_of_other_files_is_left_to_pillow(kind):
    """Files in which more than the frame matters have no plain size."""
    assert plain_jpeg_size(OTHERS[kind]) is None


def test_open_when_plain_then_without_pillow(monkeypatch):
    """A plain JPEG is opened and decoded without Pillow's decoder, with the same pixels."""
    expected = Image.open(io.BytesIO(PLAIN["RGB"])).convert("RGB")
    monkeypatch.setattr(decode, "_open", None)
    image = decode.open_encoded(PLAIN["RGB"])
    assert image.size == SIZE
    np.testing.assert_array_equal(image.decode_full(), expected)


def test_open_when_too_many_pixels_then_oversized(monkeypatch):
    """The limit on pixels holds for plain JPEGs too."""
    monkeypatch.setattr(decode, "MAX_PIXELS", SIZE[0] * SIZE[1] - 1)
    with pytest.raises(BadRecord, match="oversized_image"):
        decode.open_encoded(PLAIN["RGB"])


@pytest.mark.parametrize("kind", ["RGB", "grey", "colour profile"])
def test_decode_of_damaged_headers_is_pillow_s(kind):
    """With any byte of the header changed, decoding gives Pillow's pixels, or fails where Pillow fails."""
    data = jpeg("L", (16, 16)) if kind == "grey" else jpeg("RGB", (16, 16))
    if kind == "colour profile":
        data = jpeg(size=(16, 16), icc_profile=bytes(40))
    rng, header, compared = random.Random(0), data.index(b"\xff\xda") + 14, 0
    for _ in range(600):
        damaged = bytearray(data)
        damaged[rng.randrange(header)] = rng.choice([0, 1, 2, 3, 8, 0xC0, 0xDA, 0xE1, 0xFF, rng.randrange(256)])
        damaged = bytes(damaged)
        if plain_jpeg_size(damaged) is None:
            continue
        ours, theirs = pixels_or_reason(damaged, plain_jpeg_size), pixels_or_reason(damaged, lambda data: None)
        assert np.array_equal(ours, theirs), damaged
        compared += 1
    assert compared > 100


def pixels_or_reason(data, header_reader):
    """The pixels of `data`, or the reason why it is refused, with `header_reader` in place of the quick reader."""
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        patch.setattr(decode, "plain_jpeg_size", header_reader)
        try:
            return np.asarray(decode.decode_image(data))
        except BadRecord as error:
            return error.reason
