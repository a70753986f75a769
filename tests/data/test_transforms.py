"""Decoding of every kind of picture, and crops and patches against independent computations."""

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from aimv2_jax.data import transforms
from aimv2_jax.data.records import BadRecord
from aimv2_jax.data.transforms import decode_image

RED, WHITE = (255, 0, 0), (255, 255, 255)


def saved(image, format, **options):
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def pixels_of(data):
    image = decode_image(data)
    assert image.mode == "RGB"
    return np.asarray(image)


def near(pixels, colour, tolerance=6):
    return np.abs(pixels.astype(int) - colour).max() <= tolerance


def png(colour_type, depth, rows, width, *chunks):
    """A PNG by hand, for what Pillow does not write."""

    def chunk(name, data):
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", width, len(rows), depth, colour_type, 0, 0, 0)
    body = zlib.compress(b"".join(b"\0" + row for row in rows))
    parts = [chunk(b"IHDR", header), *(chunk(*c) for c in chunks), chunk(b"IDAT", body), chunk(b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def test_decode_when_jpeg_png_webp_gif_bmp_then_the_picture():
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
def test_decode_when_transparent_then_on_white(mode):
    image = Image.new("RGBA", (2, 1), (0, 0, 0, 255))
    image.putpixel((1, 0), (0, 0, 0, 51))
    pixels = pixels_of(saved(image.convert(mode), "PNG"))
    assert pixels.tolist() == [[[0, 0, 0], [204, 204, 204]]]


def test_decode_when_webp_with_alpha_then_on_white():
    image = Image.new("RGBA", (8, 8), (255, 0, 0, 0))
    assert near(pixels_of(saved(image, "WEBP", lossless=True)), WHITE)


def test_decode_when_palette_with_a_transparent_entry_then_on_white():
    image = Image.new("P", (2, 1))
    image.putpalette([255, 0, 0, 0, 0, 255])
    image.putpixel((1, 0), 1)
    assert pixels_of(saved(image, "PNG", transparency=1)).tolist() == [[list(RED), list(WHITE)]]
    graded = saved(image, "PNG", transparency=bytes([255, 51]))
    assert pixels_of(graded).tolist() == [[list(RED), [204, 204, 255]]]


def test_decode_when_rgb_or_grey_png_has_a_transparent_colour_then_on_white():
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
    with_alpha = png(4, 16, [struct.pack(">4H", 0, 65535, 0, 0)], 2)
    assert pixels_of(with_alpha).tolist() == [[[0, 0, 0], list(WHITE)]]


@pytest.mark.parametrize("format", ["WEBP", "GIF", "PNG"])
def test_decode_when_animated_then_the_first_frame(format):
    frames = [Image.new("RGB", (12, 12), colour) for colour in (RED, (0, 0, 255))]
    data = saved(frames[0], format, save_all=True, append_images=frames[1:])
    assert near(pixels_of(data), RED)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_decode_when_exif_orientation_then_upright(orientation):
    upright = np.zeros((4, 6, 3), np.uint8)
    upright[0, 0], upright[0, -1] = RED, (0, 255, 0)
    # What a camera stores, so that the orientation's rule (EXIF 2.3, tag 274) shows the picture upright.
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
def test_decode_when_the_exif_block_is_broken_then_the_picture_as_it_lies():
    data = saved(Image.new("RGB", (6, 4), RED), "JPEG", exif=b"Exif\0\0MM\0*\xff\xff\xff\xff garbage")
    assert pixels_of(data).shape == (4, 6, 3)


def test_decode_when_garbage_trails_then_the_picture():
    assert near(pixels_of(saved(Image.new("RGB", (8, 8), RED), "JPEG") + b"garbage" * 9), RED)


def test_decode_when_one_pixel_then_that_pixel():
    assert pixels_of(saved(Image.new("RGB", (1, 1), RED), "PNG")).tolist() == [[list(RED)]]


def noise_jpeg():
    return saved(Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)), "JPEG")


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "empty_image"),
        (b"not a picture at all", "undecodable_image"),
        (noise_jpeg()[:1500], "undecodable_image"),
        (noise_jpeg()[:30], "undecodable_image"),
        (saved(Image.new("RGB", (40, 40), RED), "PNG")[:60], "undecodable_image"),
        (png(2, 8, [b""], 20_000).replace(struct.pack(">II", 20_000, 1), struct.pack(">II", 20_000, 20_000)), "?"),
        (png(2, 8, [b""] * 2, 0), "?"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "undecodable_image"),
    ],
    ids=["no bytes", "text", "cut jpeg", "cut header", "cut png", "wrong checksum", "no pixels", "postscript"],
)
def test_decode_when_the_bytes_are_no_picture_then_a_bad_record(data, reason):
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


def crops(width, height, count, area=(0.4, 1.0), ratio=(3 / 4, 4 / 3)):
    rng = np.random.default_rng(1)
    return np.array([transforms.crop_box(rng, width, height, area, ratio) for _ in range(count)]).T


def far_apart(one, other):
    """The largest difference of two samples' distribution functions (Kolmogorov-Smirnov)."""
    one, other = np.sort(one), np.sort(other)
    points = np.concatenate([one, other])
    cdfs = [np.searchsorted(sample, points, side="right") / len(sample) for sample in (one, other)]
    return np.abs(cdfs[0] - cdfs[1]).max()


@pytest.mark.parametrize(("width", "height"), [(1000, 1000), (1600, 900), (700, 1400)])
def test_crop_when_drawn_often_then_distributed_as_torchvision_says(width, height):
    count = 4000
    boxes = crops(width, height, count)
    left, top, right, bottom = boxes
    assert left.min() >= 0 and top.min() >= 0 and right.max() <= width and bottom.max() <= height
    # Independently: a picture's tries at once, the first that fits.
    rng = np.random.default_rng(2)
    share, aspect = rng.uniform(0.4, 1.0, (count, 10)), np.exp(rng.uniform(np.log(3 / 4), np.log(4 / 3), (count, 10)))
    w, h = np.sqrt(share * width * height * aspect), np.sqrt(share * width * height / aspect)
    fits = (w <= width) & (h <= height)
    found = fits.any(1)
    first = np.flatnonzero(found), fits.argmax(1)[found]
    fallback = transforms.crop_box(np.random.default_rng(0), width, height, (2.0, 2.0), (3 / 4, 4 / 3))
    ours = np.array([tuple(box) != fallback for box in boxes.T])
    # Four standard deviations of the difference of two shares.
    assert abs(ours.mean() - found.mean()) <= 4 * np.sqrt(2 * found.mean() * (1 - found.mean()) / count)
    our_w, our_h = (right - left)[ours], (bottom - top)[ours]
    critical = 1.95 * np.sqrt(2 / ours.sum())  # Exceeded by equal distributions once in a thousand seeds.
    assert (our_w * our_h).min() / (width * height) > 0.399 and (our_w * our_h).max() <= width * height
    assert (our_w / our_h).min() > 0.749 and (our_w / our_h).max() < 1.335
    assert far_apart(our_w * our_h / (width * height), share[first]) < critical
    assert far_apart(np.log(our_w / our_h), np.log(aspect[first])) < critical
    for offset, room in ((left[ours], width - our_w), (top[ours], height - our_h)):
        wide = room > 20
        assert far_apart((offset[wide] + 0.5) / (room[wide] + 1), rng.uniform(size=wide.sum())) < 1.95 * np.sqrt(
            2 / wide.sum()
        )


@pytest.mark.parametrize(
    ("width", "height", "box"),
    [
        (1000, 10, (493, 0, 506, 10)),
        (10, 1000, (0, 493, 10, 506)),
        (20_000, 1, (9999, 0, 10_000, 1)),
        (1, 1, (0, 0, 1, 1)),
    ],
)
def test_crop_when_ten_tries_do_not_fit_then_the_centre(width, height, box):
    for left, top, right, bottom in crops(width, height, 20).T:
        assert (left, top, right, bottom) == box


def cubic_weights(start, stop, size_in, size_out):
    """The matrix of an antialiased bicubic resize (a = -0.5) of [start, stop) of `size_in` pixels to `size_out`."""
    scale = (stop - start) / size_out
    centres = start + (np.arange(size_out)[:, None] + 0.5) * scale
    x = np.abs((np.arange(size_in) + 0.5 - centres) / max(scale, 1))
    near, far = 1.5 * x**3 - 2.5 * x**2 + 1, -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2
    weights = np.where(x < 1, near, np.where(x < 2, far, 0))
    return weights / weights.sum(1, keepdims=True)


@pytest.mark.parametrize("box", [(0, 0, 61, 47), (5, 3, 50, 44), (10, 10, 20, 18)])
def test_resize_when_compared_with_the_formula_then_within_a_rounding(box):
    pixels = np.random.default_rng(0).integers(0, 256, (47, 61, 3), np.uint8)
    got = transforms.resize(Image.fromarray(pixels), box, 14)
    down, across = cubic_weights(box[1], box[3], 47, 14), cubic_weights(box[0], box[2], 61, 14)
    # Pillow goes across first and rounds to 8 bits in between.
    between = np.clip(np.round(np.einsum("xw,hwc->hxc", across, pixels)), 0, 255)
    wanted = np.clip(np.einsum("yh,hxc->yxc", down, between), 0, 255)
    assert np.abs(got - wanted).max() <= 1


def test_center_crop_when_wide_then_the_middle_square_at_size():
    pixels = np.zeros((20, 60, 3), np.uint8)
    pixels[:, 20:40] = 200
    got = transforms.center_crop(Image.fromarray(pixels), 20)
    np.testing.assert_array_equal(got, np.full((20, 20, 3), 200))


def test_center_crop_when_extremely_long_then_cheap_and_at_size():
    assert transforms.center_crop(Image.new("RGB", (20_000, 1), RED), 28).shape == (28, 28, 3)


def test_flip_when_applied_then_left_is_right():
    pixels = np.arange(18, dtype=np.uint8).reshape(2, 3, 3)
    np.testing.assert_array_equal(transforms.flip(pixels)[:, 0], pixels[:, 2])


def test_patchify_when_compared_with_slices_then_row_major_row_column_channel():
    pixels = np.random.default_rng(0).integers(0, 256, (6, 9, 3), np.uint8)
    patches, coords = transforms.patchify(pixels, 3), transforms.patch_coords((2, 3))
    assert patches.shape == (6, 27)
    assert coords.tolist() == [[0, 0], [0, 1], [0, 2], [1, 0], [1, 1], [1, 2]]
    for patch, (row, column) in zip(patches, coords):
        square = pixels[3 * row : 3 * row + 3, 3 * column : 3 * column + 3]
        assert patch.tolist() == [int(square[y, x, c]) for y in range(3) for x in range(3) for c in range(3)]
    np.testing.assert_array_equal(transforms.unpatchify(patches, (2, 3), 3), pixels)
