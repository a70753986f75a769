"""Synthetic images with the statistics of photographs, made from a seed, for the input benchmark.

Overlapping leaves of all sizes give edges at every scale, and noise of several grain sizes gives texture: power falls
with the third power of the frequency, and quality 90 takes 1.2 (at 1600) to 1.7 (at 512) bits a pixel.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from aimv2_jax.data.dataset_info import write_dataset
from aimv2_jax.data.records import Record

SIZES = {512: 48, 1600: 16}
"""Number of images by length of the longer side."""

QUALITY = 90
_WORDS = ("large", "small", "green", "brown", "round", "long", "soft", "sharp", "near", "far", "bright", "dark")
_ASPECTS = (3 / 2, 4 / 3, 1, 3 / 4)


def photo(rng: np.random.Generator, width: int, height: int) -> Image.Image:
    """Draws one image."""
    scene = Image.fromarray(_pixels(125 + 30 * _grains(rng, width // 4, height // 4, (128, 32, 8))))
    scene = scene.resize((2 * width, 2 * height))  # Drawn at twice the size for smooth edges.
    draw = ImageDraw.Draw(scene)
    diagonal = np.hypot(*scene.size)
    for radius in np.sort(0.25 * diagonal * rng.uniform(0.02, 1, max(width, height) // 6) ** 2.5)[::-1]:
        x, y = rng.uniform(0, scene.width), rng.uniform(0, scene.height)
        across, down = radius * rng.uniform(0.3, 1, 2)
        colour = rng.uniform(10, 245) + rng.normal(0, 18, 3)
        draw.ellipse((x - across, y - down, x + across, y + down), fill=tuple(np.clip(colour, 0, 255).astype(int)))
    pixels = np.asarray(scene.reduce(2), np.float32)
    texture = _grains(rng, width, height, (64, 16, 4, 2))
    return Image.fromarray(_pixels(pixels + 6 * texture.mean(-1, keepdims=True) + 2 * texture))


def _grains(rng: np.random.Generator, width: int, height: int, grains: tuple[int, ...]) -> np.ndarray:
    """Returns a sum of smooth three-channel noises, of which coarser ones are stronger."""
    total = np.zeros((height, width, 3), np.float32)
    for i, grain in enumerate(grains):
        cells = rng.standard_normal((3, height // grain + 2, width // grain + 2)).astype(np.float32)
        planes = [Image.fromarray(plane).resize((width, height), Image.Resampling.BICUBIC) for plane in cells]
        total += 0.6**i * np.stack([np.asarray(plane) for plane in planes], -1)
    return total


def _pixels(values: np.ndarray) -> np.ndarray:
    return np.clip(np.round(values), 0, 255).astype(np.uint8)


def records(side: int) -> Iterator[Record]:
    """Yields the images of one size as records, each with a caption of some twenty words."""
    for number in range(SIZES[side]):
        rng = np.random.default_rng([side, number])
        aspect = _ASPECTS[number % len(_ASPECTS)]
        width, height = (side, round(side / aspect)) if aspect >= 1 else (round(side * aspect), side)
        buffer = io.BytesIO()
        photo(rng, width, height).save(buffer, "JPEG", quality=QUALITY)
        caption = f"Leaves in front of one another, number {number}: " + " ".join(rng.choice(_WORDS, 12))
        yield Record(f"{side}/{number}", buffer.getvalue(), {"alt": caption})


def make(folder: Path) -> list[Path]:
    """Writes a prepared dataset for each size to `folder`."""
    for side in SIZES:
        write_dataset(folder / str(side), records(side))
    return [folder / str(side) for side in SIZES]
