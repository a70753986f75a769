"""Images with masks or depth maps, of a prepared dataset: checked before any work. H and W pixels, N samples."""

from __future__ import annotations

import collections
import dataclasses
import itertools
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, Int

from aimv2_jax.data.records import BadRecord, Record
from aimv2_jax.data.sources import Source
from aimv2_jax.data.transforms.decode import image_size
from aimv2_jax.data.transforms.maps import decode_map
from aimv2_jax.errors import UserError
from aimv2_jax.eval.dense.settings import DEPTH, SEGMENTATION, DenseConfig
from aimv2_jax.eval.probes.dataset import named_image, read_record
from aimv2_jax.eval.probes.features import prefetch_map
from aimv2_jax.pretrained.images import OpenedImage, open_image

_MAX_DROPPED = 0.5  # A larger share of unusable samples means that the flags, or the dataset, are wrong.
_CHUNK = 64
_NAMED_KEYS = 3
_WORDS = {SEGMENTATION: ("mask", "masks"), DEPTH: ("depth map", "depth maps")}
# What is wrong with a sample, and what to do if it is wrong with the set.
_REMEDIES = {
    "have no such map": "Prepare the dataset with --image NAME=FIELD, and name it with --map",
    "have a map of another size than the image": "Prepare maps of the size of their images",
    "have a map that cannot be decoded": "Give PNG files of one channel",
    "have a map with colours": "Save the labels as a PNG with one channel or a palette",
    "have an image that cannot be decoded": "Prepare the dataset again",
    "have a label out of range": "Give --classes, or --ignore for the label of pixels that do not count",
    "have a depth map of 8 bits": "Write depth as PNG with 16 bits, in units of --units-per-metre",
    "have a mask of 16 bits": "Write masks as PNG with 8 bits or a palette",
    "have no pixel that counts": "Check --ignore, --zero-is-ignored, --depths and --units-per-metre",
}


@dataclasses.dataclass(frozen=True)
class Sample:
    """An image that decodes no more than a crop needs, and its map: classes as uint8, or depths in metres."""

    key: str
    image: OpenedImage
    map: np.ndarray


@dataclasses.dataclass(frozen=True)
class DenseDataset:
    """The usable samples of a prepared dataset.

    Attributes:
      source: the records.
      name: of the map in each record.
      config: how the values of a map are read.
      indices: of the usable records.
      sizes: (height, width) of each usable image.
      pixels: number of pixels of each class; None for depth.
      dropped: number of unusable samples by what is wrong with them.
    """

    source: Source
    name: str
    config: DenseConfig
    indices: Int[np.ndarray, " N"]
    sizes: Int[np.ndarray, "N 2"]
    pixels: Int[np.ndarray, " C"] | None
    dropped: dict[str, int]

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> Sample:
        _, record = read_record(self.source, int(self.indices[index]), self.source.name)
        image = open_image(named_image(self.source, record))
        return Sample(record.key, image, values_of(decode_map(record.images[self.name]), self.config))


def values_of(values: np.ndarray, config: DenseConfig) -> np.ndarray:
    """The classes of a mask as uint8, with 255 where a pixel does not count; or depths in metres as float32."""
    if config.task == DEPTH:
        return depths_of(values, config)
    # A translation of bytes takes a fifth of the time of an index.
    return np.frombuffer(values.tobytes().translate(classes_of(config).tobytes()), np.uint8).reshape(values.shape)


def depths_of(values: np.ndarray, config: DenseConfig) -> Float[np.ndarray, "H W"]:
    """Depths in metres of the values of a map."""
    return values.astype(np.float32) / np.float32(config.units_per_metre)


IGNORED = 255
"""The class of a pixel that does not count, whatever its label was."""


def classes_of(config: DenseConfig) -> np.ndarray:
    """[256] The class of each label as uint8."""
    classes = np.arange(256)
    if config.zero_is_ignored:
        classes = np.where(classes == 0, IGNORED, classes - 1)
    if 0 <= config.ignore < 256:
        classes[config.ignore] = IGNORED
    return classes.astype(np.uint8)


def read_dense_dataset(
    path: str, flag: str, name: str, config: DenseConfig, num_classes: int | None = None
) -> DenseDataset:
    """Reads and checks all maps of a prepared dataset.

    Args:
      path: the dataset's folder.
      flag: the flag that named it, for error messages.
      name: of the map in each record.
      config: of the probe.
      num_classes: labels from here on are out of range; None: all classes are in range.

    Raises:
      UserError: for a dataset without such maps, or where more than half of the samples are unusable.
    """
    source = Source(path, path, flag)
    if name not in source.info.images:
        names = ", ".join(sorted(source.info.images))
        has = f"Its maps are {names}" if names else "Prepare it with --image NAME=FIELD"
        raise UserError(f"{flag} {path} has no record with this map", name, has)
    faults: dict[str, list[str]] = collections.defaultdict(list)
    kept, sizes, pixels = [], [], np.zeros(256, np.int64)

    def check(index: int) -> tuple[int, str, str | None, tuple[int, int], np.ndarray]:
        _, record = read_record(source, index, path)
        return index, record.key, *_checked(record, name, config, num_classes)

    chunks = (range(start, min(start + _CHUNK, len(source))) for start in range(0, len(source), _CHUNK))
    for index, key, fault, size, counts in itertools.chain.from_iterable(prefetch_map(check, chunks)):
        if fault is not None:
            faults[fault].append(key)
            continue
        kept.append(index)
        sizes.append(size)
        pixels[: len(counts)] += counts
    dropped = {what: len(keys) for what, keys in faults.items()}
    if faults:
        what, keys = max(faults.items(), key=lambda item: len(item[1]))
        if sum(dropped.values()) > _MAX_DROPPED * len(source):
            share = f"{len(keys):,} of {len(source):,} samples {what}, such as"
            raise UserError(f"{flag} {path}: {share}", keys[0], _REMEDIES[what])
        for what, keys in faults.items():
            print(f"{flag}: left out {len(keys):,} of {len(source):,} samples, which {what}: {_named(keys)}")
    of_class = None if config.task == DEPTH else _of_class(pixels)
    return DenseDataset(source, name, config, np.array(kept), np.array(sizes), of_class, dropped)


def _checked(
    record: Record, name: str, config: DenseConfig, num_classes: int | None
) -> tuple[str | None, tuple[int, int], np.ndarray]:
    """What is wrong with a sample or None, the size of its image, and its number of pixels by class."""
    nothing = (0, 0), np.zeros(0, np.int64)
    if name not in record.images:
        return "have no such map", *nothing
    try:
        values = decode_map(record.images[name])
    except BadRecord as error:
        coloured = error.reason == "map_with_colours"
        return "have a map with colours" if coloured else "have a map that cannot be decoded", *nothing
    try:
        width, height = image_size(record.image)
    except BadRecord:
        return "have an image that cannot be decoded", *nothing
    if values.shape != (height, width):
        return "have a map of another size than the image", *nothing
    if config.task == DEPTH:
        if values.dtype != np.uint16:
            return "have a depth map of 8 bits", *nothing
        depths = depths_of(values, config)
        if not ((depths > config.depths[0]) & (depths < config.depths[1])).any():
            return "have no pixel that counts", *nothing
        return None, (height, width), nothing[1]
    if values.dtype != np.uint8:
        return "have a mask of 16 bits", *nothing
    counts = np.bincount(values_of(values, config).ravel(), minlength=256)
    if num_classes is not None and counts[num_classes:IGNORED].any():
        return "have a label out of range", *nothing
    if not counts[:IGNORED].any():
        return "have no pixel that counts", *nothing
    return None, (height, width), counts


def _of_class(pixels: np.ndarray) -> np.ndarray:
    """The pixels of the classes, up to the last one that occurs."""
    present = np.flatnonzero(pixels[:IGNORED])
    return pixels[: present[-1] + 1]


def _named(keys: Sequence[str]) -> str:
    return ", ".join(keys[:_NAMED_KEYS]) + (", …" if len(keys) > _NAMED_KEYS else "")


def count_classes(train: DenseDataset, num_classes: int | None) -> int:
    """The number of classes: `num_classes`, or one more than the greatest class of the train masks.

    Raises:
      UserError: for one class only.
    """
    assert train.pixels is not None
    count = num_classes if num_classes is not None else len(train.pixels)
    present = np.flatnonzero(train.pixels)
    if len(present) < 2:
        remedy = "Give masks with two classes or more; the background may be one"
        raise UserError("--train has masks of one class only", int(present[0]), remedy)
    return count
