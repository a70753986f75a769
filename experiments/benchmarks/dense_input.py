"""Measures the images that the host side of probes prepares in a second of one core, without an encoder.

    python experiments/benchmarks/dense_input.py [--seconds 10] [--json FILE]

Synthetic photographs of 683 x 512 pixels as JPEG with masks as PNG (photos.py) are read from a prepared dataset. The
rows: training crops of 518 x 518 at scales of 0.5 to 2 with their masks (the settings ade20k, whose colours change on
the devices), which the devices resize, or the host; crops of 504 x 504 that are not resized, as those of nyuv2; whole
images in 1,369 patches for an encoder of native resolution; the sliding windows of the test; training crops of
photographs of 512 x 384 pixels; and photographs whose longer side is 512 pixels at 224, for features. Seconds are of
the processor's time, so that other programs on the machine do not count.
"""

from __future__ import annotations

import dataclasses
import functools
import io
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402
from PIL import Image, ImageDraw  # noqa: E402

from aimv2_jax.allocator import keep_freed_memory  # noqa: E402
from aimv2_jax.cli import Parser, check_output, positive  # noqa: E402
from aimv2_jax.data.dataset_info import write_dataset  # noqa: E402
from aimv2_jax.data.records import Record  # noqa: E402
from aimv2_jax.data.sources import Source  # noqa: E402
from aimv2_jax.data.transforms.geometry import patchify  # noqa: E402
from aimv2_jax.errors import EXIT_FINISHED, cli_main  # noqa: E402
from aimv2_jax.eval.dense.dataset import DenseDataset, read_dense_dataset  # noqa: E402
from aimv2_jax.eval.dense.features import DenseEncoder  # noqa: E402
from aimv2_jax.eval.dense.predict import Predictor  # noqa: E402
from aimv2_jax.eval.dense.settings import SETTINGS  # noqa: E402
from aimv2_jax.eval.dense.views import Packer, train_batches  # noqa: E402
from aimv2_jax.eval.probes.dataset import named_image, read_record  # noqa: E402
from aimv2_jax.eval.probes.features import prefetch_map  # noqa: E402
from aimv2_jax.pretrained.device_resize import pack  # noqa: E402
from aimv2_jax.pretrained.encoder import Pixels, PretrainedEncoder  # noqa: E402
from aimv2_jax.pretrained.encoder_spec import EncoderSpec  # noqa: E402
from experiments.benchmarks import photos  # noqa: E402

_IMAGES, _SIZE, _SMALLER, _CLASSES = 32, (683, 512), (512, 384), 20
_GRID = (37, 37)  # 518 pixels.
SPEC = EncoderSpec(1024, 24, 8, 2816, 14, 518, "learned")


def records(size: tuple[int, int]) -> Iterator[Record]:
    """Photographs of (width, height) `size` with masks of about twenty shapes."""
    for number in range(_IMAGES):
        rng = np.random.default_rng(number)
        file, mask = io.BytesIO(), Image.new("L", size)
        photos.photo(rng, *size).save(file, "JPEG", quality=photos.QUALITY)
        draw = ImageDraw.Draw(mask)
        for _ in range(_CLASSES):
            left, top, across, down = *rng.uniform(0, 0.75, 2), *rng.uniform(0.03, 0.3, 2)
            box = left * size[0], top * size[1], (left + across) * size[0], (top + down) * size[1]
            draw.ellipse(box, fill=int(rng.integers(1, _CLASSES + 1)))
        encoded = io.BytesIO()
        mask.save(encoded, "PNG")
        yield Record(f"photo/{number}", file.getvalue(), {}, images={"mask": encoded.getvalue()})


def _dataset(folder: str, size: tuple[int, int]) -> DenseDataset:
    write_dataset(folder, records(size))
    return read_dense_dataset(folder, "--input", "mask", dataclasses.replace(SETTINGS["ade20k"], ignore=255))


def encoder(area: int | None = None, device_resize: bool = False) -> DenseEncoder:
    """An encoder without parameters."""
    spec = SPEC if area is None else dataclasses.replace(SPEC, position="sincos", area=area)
    return DenseEncoder(PretrainedEncoder("none", spec, {}, None, device_resize=device_resize), _GRID)


def train_rows(dataset: DenseDataset, dense: DenseEncoder, own_size: bool = False) -> Iterator[int]:
    """Yields the number of images of each training batch, of crops at random scales or at the image's own size."""
    config = dataclasses.replace(SETTINGS["ade20k"], steps=10**6)
    if own_size:
        config = dataclasses.replace(config, resize="none", scale_range=(1.0, 1.0))
    for batch in train_batches(dataset, dense, config, config.batch_size):
        yield len(batch["valid"])


def test_rows(dataset: DenseDataset, dense: DenseEncoder) -> Iterator[int]:
    """Yields the number of images of each test batch, all of whose windows are decoded and packed."""
    predictor, packer = Predictor(dense, None, SETTINGS["ade20k"], _GRID, 8), Packer(dense, _GRID)
    groups = ([number % len(dataset) for number in range(start, start + 8)] for start in range(0, 10**6, 8))
    for group in prefetch_map(lambda index: predictor.load(dataset[index]), groups):
        windows = [window for _, views in group for view in views for window in view[0]]
        pixels = [image for _, views in group for view in views for image in view[1]]
        packer(windows, pixels, (), len(windows))
        yield len(group)


def feature_rows(source: Source, encoder: PretrainedEncoder) -> Iterator[int]:
    """Yields the number of images of each batch of features."""
    canvas, square, count = encoder.canvas, (encoder.spec.image_size, encoder.spec.image_size), encoder.batch_size
    patches = np.zeros((count, encoder.num_patches, 3 * encoder.spec.patch_size**2), np.uint8)
    groups = ([number % len(source) for number in range(start, start + count)] for start in range(0, 10**6, count))

    def load(index: int) -> Pixels:
        return encoder.decoded(named_image(source, read_record(source, index, source.name)[1]))

    for group in prefetch_map(load, groups):
        if canvas is None:
            for row, pixels in zip(patches, group):
                patchify(pixels, encoder.spec.patch_size, out=row)
        else:
            pack(group, canvas, square, count)
        yield len(group)


def rate(rows: Iterator[int], seconds: float) -> float:
    """Images a second of processor time, after the first batches."""
    for _ in range(4):
        next(rows)
    start, images = time.process_time(), 0
    while time.process_time() - start < seconds:
        images += next(rows)
    return images / (time.process_time() - start)


@cli_main
def main(arguments: Sequence[str] | None = None) -> int:
    parser = Parser(prog="python experiments/benchmarks/dense_input.py", description=__doc__.partition("\n\n")[0])
    parser.add_argument("--seconds", type=positive, default=10, metavar="N", help="of each row (default %(default)s)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rates to this file")
    flags = parser.parse_args(sys.argv[1:] if arguments is None else arguments)
    if flags.json is not None:
        check_output(flags.json, ".json", "--json")
    keep_freed_memory()
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    rows: dict[str, tuple[Callable, DenseEncoder]] = {
        "training crops": (train_rows, encoder(device_resize=True)),
        "training crops, resized on the host": (train_rows, encoder()),
        "training crops, not resized": (functools.partial(train_rows, own_size=True), encoder().at((36, 36))),
        "training, whole images": (train_rows, encoder(1369)),
        "test windows": (test_rows, encoder(device_resize=True)),
        "test windows, resized on the host": (test_rows, encoder()),
    }
    with tempfile.TemporaryDirectory() as folder:
        dataset, smaller = (_dataset(f"{folder}/{size[0]}", size) for size in (_SIZE, _SMALLER))
        rates = {name: rate(row(dataset, dense), flags.seconds) for name, (row, dense) in rows.items()}
        rates["training crops of 512 px"] = rate(train_rows(smaller, encoder(device_resize=True)), flags.seconds)
        write_dataset(f"{folder}/photos", photos.records(512))
        source = Source("photos", f"{folder}/photos", "")
        for name, on_devices in (("features", True), ("features, resized on the host", False)):
            spec = dataclasses.replace(SPEC, image_size=224)
            frozen = PretrainedEncoder("none", spec, {}, None, device_resize=on_devices)
            rates[name] = rate(feature_rows(source, frozen), flags.seconds)
    for name, images_per_s in rates.items():
        print(f"{name}: {images_per_s:.0f} images a second of one core")
    if flags.json is not None:
        flags.json.write_text(json.dumps({name: round(value, 1) for name, value in rates.items()}, indent=1) + "\n")
    return EXIT_FINISHED


if __name__ == "__main__":
    sys.exit(main())
