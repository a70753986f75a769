"""Image decoding: rejected images, and scaled or rotated crops against a full decode."""

import io
import struct
import tracemalloc
import zlib

import numpy as np
import pytest
import simplejpeg
from PIL import Image, ImageOps

from aimv2_jax.data.records import BadRecord
from aimv2_jax.data.transforms import decode
from aimv2_jax.data.transforms.decode import decode_image, open_encoded
from aimv2_jax.data.transforms.geometry import resize

RED, WHITE = (255, 0, 0), (255, 255, 255)


def saved(image, format, **options):
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def pixels_of(data):
    image = decode_image(data)
    assert image.mode == "RGB"
    return np.asarray(image)


def by_pillow(data):
    """The full upright image, decoded by Pillow without our code."""
    with Image.open(io.BytesIO(data)) as image:
        return ImageOps.exif_transpose(image).convert("RGB")


def near(pixels, colour, tolerance=6):
    return np.abs(pixels.astype(int) - colour).max() <= tolerance


def png(colour_type, depth, rows, width, *chunks):
    """A PNG assembled by hand, for variants that Pillow does not write."""

    def chunk(name, data):
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", width, len(rows), depth, colour_type, 0, 0, 0)
    body = zlib.compress(b"".join(b"\0" + row for row in rows))
    parts = [chunk(b"IHDR", header), *(chunk(*c) for c in chunks), chunk(b"IDAT", body), chunk(b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def test_decode_every_format():
    """JPEG, PNG, WebP, GIF and BMP files are decoded to their image."""
    image = Image.new("RGB", (20, 10), RED)
    for format in ("JPEG", "PNG", "WEBP", "GIF", "BMP"):
        pixels = pixels_of(saved(image, format))
        assert pixels.shape == (10, 20, 3) and near(pixels, RED), format


@pytest.mark.parametrize("mode", ["1", "L", "P", "YCbCr", "CMYK"])
def test_decode_when_opaque_modes_then_rgb(mode):
    image = Image.new("RGB", (9, 9), WHITE).convert(mode)
    format = "JPEG" if mode in ("CMYK", "YCbCr") else "PNG"
    assert near(pixels_of(saved(image, format, quality=95)), WHITE)


def test_decode_when_cmyk_jpeg_then_not_inverted():
    pixels = pixels_of(saved(Image.new("CMYK", (16, 16), (0, 255, 255, 0)), "JPEG", quality=100))
    assert near(pixels, RED, tolerance=12)


@pytest.mark.parametrize("mode", ["LA", "RGBA"])
def test_decode_when_an_alpha_channel_then_dropped(mode):
    image = Image.new("RGBA", (2, 1), (7, 7, 7, 255))
    image.putpixel((1, 0), (9, 9, 9, 0))
    assert pixels_of(saved(image.convert(mode), "PNG")).tolist() == [[[7] * 3, [9] * 3]]


def test_decode_when_webp_with_alpha_then_dropped():
    image = Image.new("RGBA", (8, 8), (255, 0, 0, 1))
    assert near(pixels_of(saved(image, "WEBP", lossless=True)), RED)


def test_decode_when_palette_has_alpha_then_dropped():
    image = Image.new("P", (2, 1))
    image.putpalette([255, 0, 0, 0, 0, 255])
    image.putpixel((1, 0), 1)
    assert pixels_of(saved(image, "PNG", transparency=bytes([255, 51]))).tolist() == [[list(RED), [0, 0, 255]]]


@pytest.mark.parametrize("format", ["PNG", "GIF"])
def test_decode_when_a_palette_entry_is_clear_then_white(format):
    image = Image.new("P", (2, 1))
    image.putpalette([255, 0, 0, 0, 0, 255])
    image.putpixel((1, 0), 1)
    assert pixels_of(saved(image, format, transparency=1)).tolist() == [[list(RED), list(WHITE)]]


def test_decode_when_a_colour_is_clear_then_white():
    rgb = png(2, 8, [bytes([255, 0, 0, 0, 0, 255])], 2, (b"tRNS", struct.pack(">HHH", 0, 0, 255)))
    assert pixels_of(rgb).tolist() == [[list(RED), list(WHITE)]]
    grey = png(0, 8, [bytes([7, 9])], 2, (b"tRNS", struct.pack(">H", 9)))
    assert pixels_of(grey).tolist() == [[[7, 7, 7], list(WHITE)]]


def test_decode_when_16_bit_png_then_scaled_not_clipped():
    values = [0, 257, 32768, 65535, 400]
    grey = png(0, 16, [struct.pack(">5H", *values)], 5)
    assert pixels_of(grey)[0, :, 0].tolist() == [0, 1, 128, 255, 2]
    rgb = png(2, 16, [struct.pack(">3H", 65535, 32896, 0)], 1)
    assert pixels_of(rgb).tolist() == [[[255, 128, 0]]]
    with_alpha = png(4, 16, [struct.pack(">4H", 0, 65535, 0x9900, 0)], 2)
    assert pixels_of(with_alpha).tolist() == [[[0, 0, 0], [153] * 3]]


@pytest.mark.parametrize("mode", ["I;16", "LA", "P", "RGBA"])
def test_decode_when_in_bands_then_the_same(monkeypatch, mode):
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (31, 20, 3), np.uint8))
    data = saved(image.convert("L").convert(mode) if mode == "I;16" else image.convert(mode), "PNG")
    whole = pixels_of(data)
    monkeypatch.setattr(decode, "_BAND_PIXELS", 90)
    np.testing.assert_array_equal(pixels_of(data), whole)


@pytest.mark.parametrize("format", ["WEBP", "GIF", "PNG"])
def test_decode_when_animated_then_the_first_frame(format):
    frames = [Image.new("RGB", (12, 12), colour) for colour in (RED, (0, 0, 255))]
    data = saved(frames[0], format, save_all=True, append_images=frames[1:])
    assert near(pixels_of(data), RED)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_decode_when_exif_orientation_then_upright(orientation):
    upright = np.zeros((4, 6, 3), np.uint8)
    upright[0, 0], upright[0, -1] = RED, (0, 255, 0)
    # The stored pixels that each orientation (EXIF 2.3, tag 274) displays upright.
    stored = {
        1: upright,
        2: upright[:, ::-1],
        3: upright[::-1, ::-1],
        4: upright[::-1],
        5: upright.swapaxes(0, 1),
        6: np.rot90(upright),
        7: np.rot90(upright.swapaxes(0, 1), 2),
        8: np.rot90(upright, -1),
    }[orientation]
    exif = Image.Exif()
    exif[274] = orientation
    data = saved(Image.fromarray(np.ascontiguousarray(stored)), "PNG", exif=exif)
    np.testing.assert_array_equal(pixels_of(data), upright)


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
def test_decode_broken_exif():
    """An image with a broken EXIF block is decoded as it is stored, without rotation."""
    data = saved(Image.new("RGB", (6, 4), RED), "JPEG", exif=b"Exif\0\0MM\0*\xff\xff\xff\xff garbage")
    assert pixels_of(data).shape == (4, 6, 3)


def test_decode_trailing_garbage():
    """An image with garbage after it is decoded."""
    assert near(pixels_of(saved(Image.new("RGB", (8, 8), RED), "JPEG") + b"garbage" * 9), RED)


def test_decode_when_one_pixel_then_that_pixel():
    assert pixels_of(saved(Image.new("RGB", (1, 1), RED), "PNG")).tolist() == [[list(RED)]]


def noise_jpeg():
    return saved(Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)), "JPEG")


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "empty_image"),
        (b"not an image at all", "undecodable_image"),
        (noise_jpeg()[:1500], "undecodable_image"),
        (noise_jpeg()[:30], "undecodable_image"),
        (saved(Image.new("RGB", (40, 40), RED), "PNG")[:60], "undecodable_image"),
        (png(2, 8, [b""], 20_000).replace(struct.pack(">II", 20_000, 1), struct.pack(">II", 20_000, 20_000)), "?"),
        (png(2, 8, [b""] * 2, 0), "?"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "undecodable_image"),
    ],
    ids=["no bytes", "text", "cut jpeg", "cut header", "cut png", "wrong checksum", "no pixels", "postscript"],
)
def test_decode_invalid_bytes(data, reason):
    """Bytes that are not an image raise BadRecord."""
    with pytest.raises(BadRecord) as error:
        decode_image(data)
    assert reason in ("?", error.value.reason)


@pytest.mark.parametrize("side", [10_000, 20_000])
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_decode_when_a_decompression_bomb_then_refused_before_it_goes_off(side):
    bomb = png(0, 1, [], side)
    header = struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0)
    bomb = bomb[:16] + header + struct.pack(">I", zlib.crc32(b"IHDR" + header)) + bomb[33:]
    with pytest.raises(BadRecord, match="oversized_image"):
        decode_image(bomb)


def test_decode_when_of_16_bits_then_memory_is_bounded():
    data = saved(Image.fromarray(np.zeros((3000, 3000), np.uint16)), "PNG")
    tracemalloc.start()
    try:
        decode_image(data)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert (
        peak < 3000 * 3000 * 3
    )  # The arrays of one band. Converting the whole image in 64 bits took 16 bytes per pixel.


@pytest.mark.parametrize(("format", "fits"), [("WEBP", False), ("PNG", True)])
def test_open_when_it_would_take_too_much_memory(monkeypatch, format, fits):
    data = saved(Image.new("RGB", (10, 10), RED), format)
    monkeypatch.setattr(decode, "_MAX_DECODE_BYTES", 15 * 100)
    if fits:
        assert open_encoded(data).size == (10, 10)
        return
    with pytest.raises(BadRecord, match="oversized_image"):
        open_encoded(data)


@pytest.fixture(scope="module")
def photo():
    """Blurred noise at several scales and some edges: a spectrum like that of a photograph."""
    rng = np.random.default_rng(0)
    pixels = np.zeros((900, 1210, 3))
    for grain in (300, 100, 30, 10, 3):
        noise = rng.normal(0, grain**0.6, (900 // grain + 1, 1210 // grain + 2, 3))
        planes = [Image.fromarray(noise[..., c].astype(np.float32)).resize((1210, 900), 3) for c in range(3)]
        pixels += np.stack([np.asarray(plane) for plane in planes], -1)
    pixels[200:700, 300:800] += 60
    return Image.fromarray(np.clip(pixels + 120, 0, 255).astype(np.uint8))


@pytest.fixture
def decoded_sizes(monkeypatch):
    """Records the (height, width) of every image that simplejpeg decodes."""
    sizes, decode = [], simplejpeg.decode_jpeg

    def watched(*args, **kwargs):
        pixels = decode(*args, **kwargs)
        sizes.append(pixels.shape[:2])
        return pixels

    monkeypatch.setattr(simplejpeg, "decode_jpeg", watched)
    return sizes


def psnr(one, other):
    return 10 * np.log10(255**2 / max(np.mean((one.astype(float) - other) ** 2), 1e-9))


def crop(data, box, size):
    image, box = open_encoded(data).decode(box, size)
    assert image.mode == "RGB"
    return resize(image, box, size)


KINDS = {
    "4:2:0": {},
    "4:4:4": {"subsampling": 0},
    "4:2:2": {"subsampling": 1},
    "progressive": {"progressive": True},
    "rgb": {"keep_rgb": True},
    "restarts": {"restart_marker_rows": 2},
}


@pytest.mark.parametrize("kind", [*KINDS, "grey"])
def test_crop_when_of_any_jpeg_then_near_a_decode_of_the_whole(photo, decoded_sizes, kind):
    image = photo.convert("L") if kind == "grey" else photo
    data = saved(image, "JPEG", quality=90, **KINDS.get(kind, {}))
    whole, qualities = by_pillow(data), []
    boxes = [
        (0, 0, 1210, 900),
        (100, 51, 1001, 888),
        (0.5, 0.5, 899.5, 899.5),
        (400, 203, 777, 600),
        (707, 1, 1210, 64),
    ]
    for box in boxes:
        for size in (14, 56, 224):
            qualities.append(psnr(crop(data, box, size), resize(whole, box, size)))
    assert np.median(qualities) >= 43 and min(qualities) >= 37
    assert {900 // height for height, _ in decoded_sizes} == {
        1,
        2,
        4,
        7,
    }  # simplejpeg rounds 900 / 8 = 112.5 up to 113.


@pytest.mark.parametrize(
    ("side", "size", "scale"),
    [(292, 112, 2), (291, 112, 1), (583, 112, 4), (582, 112, 2), (1165, 112, 8), (1164, 112, 4), (60, 112, 1)],
)
def test_crop_when_it_has_pixels_to_spare_then_decoded_scaled(decoded_sizes, side, size, scale):
    data = saved(Image.new("RGB", (1300, 1201), RED), "JPEG")
    assert near(crop(data, (3, 5, 3 + side, 5 + side), size), RED)
    # The shorter side determines the scale.
    assert near(crop(data, (0, 5, 1300, 5 + side), size), RED)
    assert decoded_sizes == [(-(-1201 // scale), -(-1300 // scale))] * 2


def test_crop_tiny_image_scale(decoded_sizes):
    """A crop of a tiny image is scaled down while decoding by 2, 4 or 8 or not at all."""
    for width in range(1, 90, 4):
        for height in range(1, 90, 5):
            data = saved(Image.new("RGB", (width, height), RED), "JPEG")
            for size in (1, 2, 14):
                assert near(crop(data, (0, 0, width, height), size), RED)
                assert decoded_sizes.pop() in [(-(-height // k), -(-width // k)) for k in (1, 2, 4, 8)]
    assert not decoded_sizes


@pytest.mark.parametrize("size", [(1, 1), (20_000, 1), (7, 3000), (7, 699), (3000, 7), (33, 31)])
def test_crop_when_the_size_is_odd_then_as_of_the_whole(size):
    noise = np.random.default_rng(0).integers(0, 256, (*size[::-1], 3), np.uint8)
    data = saved(Image.fromarray(noise), "JPEG")
    short = min(size)
    for box in ((0, 0, short, short), (0, 0, *size), (size[0] - short, size[1] - short, *size)):
        got, wanted = crop(data, box, 28), resize(by_pillow(data), box, 28)
        if size[1] > 100 * size[0]:  # Pillow resizes the height of these first, and rounds and clips in between.
            assert psnr(got, wanted) >= 43
        else:
            np.testing.assert_array_equal(got, wanted)


@pytest.mark.parametrize("kind", [*KINDS, "grey"])
@pytest.mark.parametrize("orientation", [1, 6])
def test_whole_of_a_jpeg_is_pixel_for_pixel_pillow_s(photo, decoded_sizes, kind, orientation):
    exif = Image.Exif()
    exif[274] = orientation
    image = photo.convert("L") if kind == "grey" else photo
    data = saved(image.crop((0, 0, 333, 251)), "JPEG", exif=exif, **KINDS.get(kind, {}))
    np.testing.assert_array_equal(decode_image(data), by_pillow(data))
    assert decoded_sizes == [(251, 333)]


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("size", [14, 56, 336])
def test_crop_when_a_jpeg_is_turned_then_as_if_it_had_been_upright(photo, orientation, size, decoded_sizes):
    exif = Image.Exif()
    exif[274] = orientation
    data = saved(photo, "JPEG", quality=90, exif=exif)
    whole = by_pillow(data)
    assert open_encoded(data).size == whole.size == (photo.size[::-1] if orientation > 4 else photo.size)
    for box in ((0, 0, 600, 640), (whole.width - 611, whole.height - 599, *whole.size), (100, 60.5, 720, 801.5)):
        got, wanted = crop(data, box, size), resize(whole, box, size)
        assert psnr(got, wanted) >= 40
        if decoded_sizes[-1] == (900, 1210):
            assert np.abs(got.astype(int) - wanted).max() <= 1
    assert (decoded_sizes[0] == (900, 1210)) == (size == 336)


@pytest.mark.parametrize("format", ["PNG", "WEBP", "GIF", "BMP"])
def test_crop_when_no_jpeg_then_of_the_whole(photo, format, decoded_sizes):
    data = saved(photo.resize((121, 90)), format)
    np.testing.assert_array_equal(crop(data, (3, 4, 95, 88), 28), resize(decode_image(data), (3, 4, 95, 88), 28))
    assert decoded_sizes == []


def test_crop_when_a_cmyk_jpeg_then_of_the_whole(decoded_sizes):
    data = saved(Image.new("CMYK", (200, 160), (0, 255, 255, 0)), "JPEG", quality=100)
    assert near(crop(data, (0, 0, 150, 150), 14), RED, tolerance=12)
    assert decoded_sizes == []


@pytest.mark.parametrize("progressive", [False, True])
@pytest.mark.parametrize("size", [224, 56])
def test_crop_when_a_jpeg_is_cut_anywhere_then_a_bad_record(photo, progressive, size):
    whole = saved(photo.resize((403, 300)), "JPEG", progressive=progressive)
    for length in [*range(20, len(whole), 397), *range(len(whole) - 30, len(whole))]:
        for box in ((0, 0, 300, 300), (0, 0, 200, 160)):
            with pytest.raises(BadRecord, match="undecodable_image"):
                crop(whole[:length], box, size)


@pytest.mark.parametrize("garbage", [b"garbage" * 99, b"\0" * 4096, b"\xff\xd8\xff\xe0" * 9, b"\xff"])
@pytest.mark.parametrize("size", [14, 224])
def test_crop_when_garbage_trails_a_jpeg_then_the_same(photo, garbage, size):
    data = saved(photo.resize((403, 300)), "JPEG")
    np.testing.assert_array_equal(crop(data + garbage, (9, 9, 200, 200), size), crop(data, (9, 9, 200, 200), size))


def test_crop_when_a_jpeg_draws_a_warning_then_pillow_decides(photo, decoded_sizes):
    data = bytearray(saved(photo.resize((403, 300)), "JPEG"))
    rng = np.random.default_rng(0)
    seen = {"used": 0, "refused": 0}
    for position in [*rng.integers(2, 600, 40), *rng.integers(600, len(data), 40)]:  # Header, then pixels.
        bad = bytearray(data)
        bad[position] ^= 1 << rng.integers(8)
        box, decoded_sizes[:] = (10, 10, 290, 290), []
        try:
            whole = resize(decode_image(bytes(bad)), box, 224)
        except BadRecord as error:
            with pytest.raises(BadRecord, match=error.reason):
                crop(bytes(bad), box, 224)
            seen["refused"] += 1
            continue
        assert np.abs(crop(bytes(bad), box, 224).astype(int) - whole).max() <= 1
        seen["used"] += not decoded_sizes
    assert min(seen.values()) > 0


def test_open_header_only(photo):
    """The header alone is enough to open an image and read its size."""
    data = saved(photo, "JPEG")
    image = open_encoded(data[:800])
    assert image.size == (1210, 900)
    with pytest.raises(BadRecord, match="undecodable_image"):
        image.decode_full()


@pytest.mark.parametrize("colours", [1, 2])
def test_spare_when_compared_with_the_bound_then_enough_at_its_edge(photo, colours):
    """The smallest allowed oversampling of a scaled decode, where the difference is largest."""
    data = saved(photo if colours == 1 else photo.transpose(Image.Transpose.ROTATE_90), "JPEG", quality=90)
    whole, qualities = by_pillow(data), []
    for scale in (2, 4, 8):
        size = 56
        side = int(np.ceil(scale * decode.SPARE * size))
        for left, top in ((0, 0), (101, 203), (300, 290)):
            box = (left, top, left + side, top + side)
            qualities.append(psnr(crop(data, box, size), resize(whole, box, size)))
    assert np.median(qualities) >= 43 and min(qualities) >= 37
