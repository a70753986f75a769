"""Scenes for a study of dense probes: cut-outs on photographs with masks, and rendered rooms with depth maps.

A cut-out is an image whose alpha channel is its mask: emoji, stamps, clip art and renderings of the pairs, of one
category each. Scenes are functions of a seed and their number. They contain the images of the pairs, some of which may
not be handed on: they are written to a work folder only.
"""

from __future__ import annotations

import dataclasses
import io
import tarfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image

from aimv2_jax.data.records import Record
from aimv2_jax.errors import UserError
from aimv2_jax.untrusted import parse_json_object

CUT_OUTS = ("fluent_emoji_3d", "openclipart", "sweethome3d", "tuxpaint_stamps")
PHOTOGRAPHS = ("endless_sky_land",)
CATEGORIES = ("animal", "plant", "food", "vehicle", "building", "person", "object", "furniture", "symbol")
CLASSES = ("background", *CATEGORIES)
SIZE = 224
_OPAQUE = 128  # Alpha from which a pixel belongs to the cut-out.
_LEAST_SHARE, _MOST_SHARE = 0.05, 0.95  # Share of opaque pixels: a full square is no cut-out.
_OBJECTS = (2, 4)  # Least and most cut-outs of a scene.
_SIDES = (72, 128)  # Their longer side in pixels.
_HORIZON, _WALL_M, _EYE_M = 0.42, 9.0, 1.6  # Share of the height, and metres.


@dataclasses.dataclass(frozen=True)
class CutOut:
    """An image with alpha, cropped to what is opaque, and its class."""

    image: Image.Image
    label: int


def read_pairs(folder: Path, source: str, split: str) -> Iterator[tuple[dict, bytes]]:
    """(fields, encoded image) of each pair of a source."""
    path = folder / source / split / "00000.tar"
    if not path.is_file():
        raise UserError("--pairs has no such tar", str(path), "Give a folder with SOURCE/{train,test}/00000.tar")
    fields: dict = {}
    with tarfile.open(path) as tar:
        members = {member.name: member for member in tar if member.isfile()}
        for name, member in members.items():
            stem, _, suffix = name.rpartition(".")
            if suffix in ("png", "webp", "jpg"):
                fields = parse_json_object(tar.extractfile(members[f"{stem}.json"]).read())
                yield fields, tar.extractfile(member).read()


def read_cut_outs(folder: Path, split: str) -> list[CutOut]:
    """The cut-outs of a split whose category is one of `CATEGORIES`."""
    found = []
    for source in CUT_OUTS:
        for fields, data in read_pairs(folder, source, split):
            if fields["coarse"] not in CATEGORIES:
                continue
            image = Image.open(io.BytesIO(data)).convert("RGBA")
            opaque = np.asarray(image)[..., 3] >= _OPAQUE
            if _LEAST_SHARE <= opaque.mean() <= _MOST_SHARE:
                box = image.getchannel("A").point(lambda alpha: 255 * (alpha >= _OPAQUE)).getbbox()
                found.append(CutOut(image.crop(box), CLASSES.index(fields["coarse"])))
    return found


def read_photographs(folder: Path, split: str) -> list[Image.Image]:
    """The photographs of a split, for backgrounds."""
    encoded = (data for source in PHOTOGRAPHS for _, data in read_pairs(folder, source, split))
    return [Image.open(io.BytesIO(data)).convert("RGB") for data in encoded]


def pasted_scene(
    cut_outs: list[CutOut], photographs: list[Image.Image], rng: np.random.Generator
) -> tuple[Image.Image, np.ndarray]:
    """A square of a photograph with cut-outs on it, the later ones in front, and its mask of classes."""
    photograph = photographs[rng.integers(len(photographs))]
    side = int(min(photograph.size) * rng.uniform(0.6, 1.0))
    left, top = (int(rng.integers(length - side + 1)) for length in photograph.size)
    scene = photograph.resize((SIZE, SIZE), Image.Resampling.BICUBIC, box=(left, top, left + side, top + side))
    mask = np.zeros((SIZE, SIZE), np.uint8)
    # Classes are drawn first, so that all are as frequent.
    by_class = {label: [cut for cut in cut_outs if cut.label == label] for label in range(1, len(CLASSES))}
    for _ in range(rng.integers(_OBJECTS[0], _OBJECTS[1] + 1)):
        choices = by_class[int(rng.integers(1, len(CLASSES)))]
        cut_out = choices[rng.integers(len(choices))]
        scale = rng.uniform(*_SIDES) / max(cut_out.image.size)
        size = tuple(max(4, round(length * scale)) for length in cut_out.image.size)
        image = cut_out.image.resize(size, Image.Resampling.BICUBIC)
        x, y = (int(rng.integers(SIZE - length + 1)) for length in size)
        scene.paste(image, (x, y), image)
        opaque = np.asarray(image)[..., 3] >= _OPAQUE
        mask[y : y + size[1], x : x + size[0]][opaque] = cut_out.label
    return scene, mask


def rendered_room(rng: np.random.Generator) -> tuple[Image.Image, np.ndarray]:
    """A floor that runs back to a wall, with boxes standing on it, and its depths in metres [SIZE, SIZE].

    A floor's row is as far as perspective says, a box's front as its foot. Colours say nothing of depth; the pattern of
    the floor gets finer with it.
    """
    rows, columns = np.mgrid[:SIZE, :SIZE].astype(np.float64) + 0.5
    horizon, focal = SIZE * (_HORIZON + rng.uniform(-0.08, 0.08)), SIZE * rng.uniform(0.8, 1.2)
    floor = _EYE_M * focal / np.maximum(rows - horizon, 1e-6)
    wall = rng.uniform(5.0, _WALL_M)
    depth = np.minimum(floor, wall)
    on_floor = floor < wall
    tile = rng.uniform(0.3, 0.8)
    across, along = (columns - SIZE / 2) * depth / focal, depth
    pattern = (np.floor(across / tile) + np.floor(along / tile)) % 2
    light, dark, paint = (rng.uniform(30, 225, 3) for _ in range(3))
    colour = np.where(on_floor[..., None], np.where(pattern[..., None] > 0, light, dark), paint)
    for distance in sorted(rng.uniform(1.8, wall - 0.3, rng.integers(2, 6)))[::-1]:
        foot = horizon + _EYE_M * focal / distance
        height, width = (metres * focal / distance for metres in rng.uniform(0.4, 1.8, 2))
        left = rng.uniform(-width / 2, SIZE - width / 2)
        inside = (rows < foot) & (rows > foot - height) & (columns > left) & (columns < left + width)
        depth = np.where(inside, distance, depth)
        shade = 1 - 0.25 * (columns - left) / width
        colour = np.where(inside[..., None], rng.uniform(30, 225, 3) * shade[..., None], colour)
    colour = colour + rng.normal(0, 4, colour.shape)
    return Image.fromarray(colour.clip(0, 255).astype(np.uint8)), depth


def pasted_records(folder: Path, split: str, count: int, seed: int) -> Iterator[Record]:
    """Records of pasted scenes with `mask`."""
    cut_outs, photographs = read_cut_outs(folder, split), read_photographs(folder, split)
    for number in range(count):
        scene, mask = pasted_scene(cut_outs, photographs, np.random.default_rng([seed, number]))
        yield Record(f"{split}/{number}", encoded(scene), {}, images={"mask": encoded(Image.fromarray(mask))})


def rendered_records(split: str, count: int, seed: int) -> Iterator[Record]:
    """Records of rendered rooms with `depth`, in millimetres."""
    for number in range(count):
        scene, depth = rendered_room(np.random.default_rng([seed, number]))
        values = (1000 * depth).round().astype(np.uint16)
        yield Record(f"{split}/{number}", encoded(scene), {}, images={"depth": encoded(Image.fromarray(values))})


def encoded(image: Image.Image) -> bytes:
    """The image as PNG."""
    file = io.BytesIO()
    image.save(file, "PNG", compress_level=1)
    return file.getvalue()
