"""Datasets of discs on white with masks of their colours, and of grey ramps whose depth is their grey."""

import io

import numpy as np
import pytest
from PIL import Image

from aimv2_jax.data.dataset_info import write_dataset
from aimv2_jax.data.records import Record
from tests.helpers.trained_run import COLORS


def png(values):
    file = io.BytesIO()
    Image.fromarray(values).save(file, "PNG")
    return file.getvalue()


def disc(number, size=(64, 80)):
    """An image of (height, width) `size` and its mask: 0 is the background, 1 to 3 the colour of the disc."""
    rng, (height, width) = np.random.default_rng(number), size
    y, x = np.mgrid[:height, :width]
    inside = np.hypot(x - rng.uniform(20, width - 20), y - rng.uniform(20, height - 20)) < 20
    pixels = np.full((height, width, 3), 255, np.uint8)
    pixels[inside] = list(COLORS.values())[number % 3]
    return pixels, (inside * (1 + number % 3)).astype(np.uint8)


def disc_record(number, **changes):
    pixels, mask = disc(number, (64, 80) if number % 2 else (72, 64))
    return Record(f"disc/{number}", png(pixels), {}, images={"mask": png(mask)}, **changes)


def ramp_record(number):
    """A ramp from near (dark) to far (bright): its grey of 51 is a depth of a metre."""
    rng = np.random.default_rng(number)
    low, high = sorted(rng.uniform(0.5, 4.8, 2))
    ramp = np.linspace(low, high + 0.1, 80)[None].repeat(64, axis=0)
    depth = ramp if number % 2 else ramp[:, ::-1]
    grey = (depth * 51).round().astype(np.uint8)
    image = np.stack([grey] * 3, axis=-1)
    return Record(f"ramp/{number}", png(image), {}, images={"depth": png((depth * 1000).astype(np.uint16))})


@pytest.fixture(scope="session")
def dense_data(tmp_path_factory):
    """The folder of four datasets: discs/train, discs/test, ramps/train and ramps/test."""
    folder = tmp_path_factory.mktemp("dense")
    for name, record in (("discs", disc_record), ("ramps", ramp_record)):
        write_dataset(folder / name / "train", map(record, range(24)))
        write_dataset(folder / name / "test", map(record, range(24, 34)))
    return folder
