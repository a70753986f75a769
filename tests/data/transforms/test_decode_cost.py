"""Small files that are slow to decode are rejected quickly, and valid files of every format are accepted."""

import io
import random
import struct
import time
import zlib

import numpy as np
import pytest
from PIL import Image

from aimv2_jax.data.records import BadRecord
from aimv2_jax.data.transforms.decode import decode_image, image_size, open_encoded
from aimv2_jax.data.transforms.decode_cost import MAX_SCANS, check_cost
from aimv2_jax.prepare.filters import DroppedSample, Rules, check
from aimv2_jax.prepare.inputs.samples import Sample

AT_ONCE_S = 0.5  # Pillow takes 2 s or more for each of these files; the block check takes milliseconds.


def saved(format, mode="RGB", size=(64, 48), **options):
    buffer = io.BytesIO()
    pixels = np.random.default_rng(0).integers(0, 256, (*size[::-1], 3), np.uint8)
    Image.fromarray(pixels).convert(mode).save(buffer, format, **options)
    return buffer.getvalue()


def with_scans(data, count):
    """A progressive JPEG whose last scan is repeated up to `count` scans."""
    start, end = data.rfind(b"\xff\xda"), data.rfind(b"\xff\xd9")
    return data[:end] + data[start:end] * (count - data.count(b"\xff\xda")) + data[end:]


def chunk(name, content=b""):
    return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))


def inserted(data, position, what):
    return data[:position] + what + data[position:]


JPEG, PNG, GIF = saved("JPEG"), saved("PNG"), saved("GIF", "P")
PROGRESSIVE = saved("JPEG", progressive=True)
GIF_PALETTE_END = 13 + 3 * 2 ** (GIF[10] % 8 + 1)
SOF = JPEG.index(b"\xff\xc0")
COSTLY = {
    "scans": with_scans(PROGRESSIVE, MAX_SCANS + 1),
    "scans after a segment that holds an end": with_scans(
        inserted(PROGRESSIVE, PROGRESSIVE.rfind(b"\xff\xda"), b"\xff\xfe\0\x04\xff\xd9"), MAX_SCANS + 1
    ),
    "one component a scan": inserted(JPEG, JPEG.index(b"\xff\xda"), b"\xff\xda\0\x08\x01\x01\0\0\x3f\0" * 200),
    "empty comments": inserted(JPEG, 2, b"\xff\xfe\0\x02" * 600_000),
    "filling": inserted(JPEG, SOF, b"\xff" * 2_000_000),
    "filling by and by": inserted(JPEG, SOF, (b"\xff" * 60_000 + b"\xfe\0\x02") * 40),
    "filling after an end": inserted(JPEG, SOF, b"\xff\xd9" + b"\xff" * 2_000_000),
    "zeros between segments": inserted(JPEG, SOF, bytes(8_000_000)),
    "PNG chunks": inserted(PNG, 33, chunk(b"prVt") * 250_000),
    "PNG chunks after pixels": inserted(PNG, len(PNG) - 12, chunk(b"prVt") * 250_000),
    "PNG without pixels in its chunks": inserted(PNG, 33, chunk(b"IDAT") * 250_000),
    "GIF comments": inserted(GIF, GIF_PALETTE_END, b"\x21\xfe\x01a\0" * 200_000),
    "GIF comment in parts": inserted(GIF, GIF_PALETTE_END, b"\x21\xfe" + b"\x01a" * 400_000 + b"\0"),
    "GIF of stray bytes": inserted(GIF, GIF_PALETTE_END, b"\x01" * 2_000_000),
}


@pytest.mark.parametrize("name", COSTLY)
def test_image_when_costly_then_refused_at_once(name):
    data, start = COSTLY[name], time.process_time()
    for use in (open_encoded, image_size, decode_image):
        with pytest.raises(BadRecord, match="costly_image"):
            use(data)
    with pytest.raises(DroppedSample, match="costly_image"):
        check(Sample("k", data, {"txt": "A thing."}), Rules({"alt": "txt"}))
    assert time.process_time() - start < AT_ONCE_S


def noise(count):
    return random.Random(0).randbytes(count)


def as_large(data, height, width):
    """A JPEG whose header claims a larger size."""
    start = data.index(b"\xff\xc2") + 5
    return data[:start] + struct.pack(">HH", height, width) + data[start + 4 :]


@pytest.mark.parametrize(("scans", "side", "costly"), [(45, 9400, False), (46, 9400, True), (128, 5500, False)])
def test_scans_of_large_jpegs_are_fewer(scans, side, costly):
    """A scan of 9400 x 9400 pixels takes 0.2 s."""
    data = as_large(with_scans(PROGRESSIVE, scans), side, side)
    if costly:
        with pytest.raises(BadRecord, match="costly_image"):
            check_cost(data)
    else:
        check_cost(data)


def test_bmp_with_run_lengths_is_refused_when_large():
    """Pillow decodes a run-length BMP in Python: 2.2 s for 13 kB of 3000 x 3000 pixels."""
    header = struct.pack("<IiiHHIIiiII", 40, 3000, 3000, 1, 8, 1, 0, 0, 0, 256, 0) + bytes(1024)
    runs = b"\0\0" * 3000 + b"\0\1"
    data = b"BM" + struct.pack("<IHHI", 14 + len(header) + len(runs), 0, 0, 14 + len(header)) + header + runs
    with pytest.raises(BadRecord, match="costly_image"):
        decode_image(data)


SOUND = {
    "as many scans as there may be": with_scans(PROGRESSIVE, MAX_SCANS),
    "a film behind the photograph": PROGRESSIVE + noise(1 << 16) + b"\xff\xda" * 1000,
    "a profile and depth in the header": inserted(JPEG, 2, (b"\xff\xe2\xff\xff" + noise(65_533)) * 160),
    "aligned segments": inserted(JPEG, SOF, b"\xff" * 4096),
    "restarts": saved("JPEG", restart_marker_blocks=1),
    "PNG chunks of 8 KiB": inserted(PNG, 33, chunk(b"prVt", noise(8192)) * 500),
    "an animation": saved("GIF", save_all=True, append_images=[Image.new("RGB", (64, 48))] * 30),
    "a profile in a GIF": inserted(
        GIF, GIF_PALETTE_END, b"\x21\xff\x0bICCRGBG1012" + (b"\xff" + noise(255)) * 2000 + b"\0"
    ),
    "WebP": saved("WEBP"),
    "BMP": saved("BMP"),
    "grey": saved("JPEG", "L"),
    "CMYK": saved("JPEG", "CMYK"),
}


@pytest.mark.filterwarnings("ignore")  # Pillow warns about invalid profiles.
@pytest.mark.parametrize("name", SOUND)
def test_image_when_sound_then_decoded(name):
    assert decode_image(SOUND[name]).size == (64, 48)


@pytest.mark.parametrize(
    "data", [JPEG, PROGRESSIVE, PNG, GIF, saved("WEBP")], ids=["jpeg", "scans", "png", "gif", "webp"]
)
def test_check_when_cut_or_changed_anywhere_then_no_error(data):
    rng = random.Random(0)
    for _ in range(300):
        broken = bytearray(data[: rng.randrange(len(data) + 1)])
        for _ in range(rng.randrange(4)):
            if broken:
                broken[rng.randrange(len(broken))] = rng.choice((0, 0xD8, 0xD9, 0xDA, 0xFE, 0xFF))
        check_cost(bytes(broken))
