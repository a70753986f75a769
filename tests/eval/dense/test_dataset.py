"""Samples that cannot be used are counted and named, and a set of them is refused."""

import dataclasses
import re

import numpy as np
import pytest

from aimv2_jax.data.dataset_info import write_dataset
from aimv2_jax.data.records import Record
from aimv2_jax.errors import UserError
from aimv2_jax.eval.dense.dataset import count_classes, read_dense_dataset
from aimv2_jax.eval.dense.settings import DEPTH, SEGMENTATION, DenseConfig
from tests.eval.dense.conftest import disc_record, png, ramp_record

SEGMENT, DEPTHS = DenseConfig(SEGMENTATION), DenseConfig(DEPTH)


def with_map(number, values, name="mask"):
    return dataclasses.replace(disc_record(number), images={name: png(values)})


FAULTS = {
    "have no such map": lambda n: dataclasses.replace(disc_record(n), images={}),
    "have a map of another size than the image": lambda n: with_map(n, np.ones((8, 8), np.uint8)),
    "have a map with colours": lambda n: with_map(n, np.ones((64, 80, 3), np.uint8)),
    "have a map that cannot be decoded": lambda n: dataclasses.replace(disc_record(n), images={"mask": b"\x89PNG"}),
    "have a mask of 16 bits": lambda n: with_map(n, np.ones((64, 80), np.uint16)),
    "have a label out of range": lambda n: with_map(n, np.full((64, 80), 4, np.uint8)),
    "have no pixel that counts": lambda n: with_map(n, np.full((64, 80), 255, np.uint8)),
    "have an image that cannot be decoded": lambda n: dataclasses.replace(disc_record(n), image=b"none"),
}


def written(folder, records):
    write_dataset(folder, records)
    return str(folder)


def test_unusable_samples_are_left_out_and_named(tmp_path, capsys):
    """Each fault is counted and named by its keys; the others are read, with the pixels of their classes."""
    faults = [make(2 * number + 1) for number, make in enumerate(FAULTS.values())]
    path = written(tmp_path / "data", [*map(disc_record, range(20, 30)), *faults])
    dataset = read_dense_dataset(path, "--train", "mask", SEGMENT, 4)
    assert dataset.dropped == dict.fromkeys(FAULTS, 1) and len(dataset) == 10
    output = capsys.readouterr().out
    for number, what in enumerate(FAULTS):
        assert f"left out 1 of 18 samples, which {what}: disc/{2 * number + 1}" in output
    masks = [dataset[index].map for index in range(10)]
    expected = sum(np.bincount(mask.ravel(), minlength=4) for mask in masks)
    np.testing.assert_array_equal(dataset.pixels, expected)
    assert dataset.sizes.tolist() == [list(mask.shape) for mask in masks] and count_classes(dataset, None) == 4


@pytest.mark.parametrize("what", [what for what in FAULTS if what != "have no such map"])
def test_set_of_unusable_samples_is_refused(tmp_path, what):
    """If most samples have a fault, the error has their number, the fault and an example."""
    faults = [FAULTS[what](number) for number in (1, 3, 5)]
    path = written(tmp_path / "data", [disc_record(0), disc_record(2), *faults])
    with pytest.raises(UserError, match=re.escape(f"3 of 5 samples {what}, such as: 'disc/1'")):
        read_dense_dataset(path, "--train", "mask", SEGMENT, 4)


def test_depth_maps_of_8_bits_are_refused(tmp_path, capsys):
    """A depth map of 8 bits is left out, and a set of them refused; so are maps of one depth out of range."""
    masks = written(tmp_path / "masks", map(disc_record, range(3)))
    with pytest.raises(UserError, match=r"3 of 3 samples have a depth map of 8 bits.*PNG with 16 bits"):
        read_dense_dataset(masks, "--train", "mask", DEPTHS)
    records = [
        *map(ramp_record, range(4)),
        dataclasses.replace(ramp_record(5), images={"depth": png(np.eye(64, 80) > 2)}),
    ]
    some = written(tmp_path / "some", records)
    dataset = read_dense_dataset(some, "--train", "depth", DEPTHS)
    assert dataset.dropped == {"have a depth map of 8 bits": 1} and dataset.pixels is None
    assert dataset[0].map.dtype == np.float32 and 0.5 < dataset[0].map.min() < dataset[0].map.max() < 5
    with pytest.raises(UserError, match=r"have no pixel that counts.*--units-per-metre"):
        read_dense_dataset(some, "--train", "depth", dataclasses.replace(DEPTHS, units_per_metre=1e-3))


def test_missing_map_and_one_class_are_refused(tmp_path):
    """A name that no record has is refused with the names that they have, and so are masks of one class."""
    path = written(tmp_path / "data", map(disc_record, range(3)))
    with pytest.raises(UserError, match=r"no record with this map: 'depth'\. Its maps are mask"):
        read_dense_dataset(path, "--test", "depth", SEGMENT)
    plain = written(tmp_path / "plain", [Record("a", disc_record(0).image, {})])
    with pytest.raises(UserError, match="Prepare it with --image"):
        read_dense_dataset(plain, "--test", "mask", SEGMENT)
    background = written(tmp_path / "one", [with_map(1, np.full((64, 80), 2, np.uint8))])
    with pytest.raises(UserError, match="masks of one class only: 2"):
        count_classes(read_dense_dataset(background, "--train", "mask", SEGMENT), None)


def test_labels_that_do_not_count(tmp_path):
    """A label can be ignored by number, and 0 by name: then label c + 1 is class c."""
    values = np.zeros((64, 80), np.uint8)
    values[:10], values[10:20], values[20:30] = 1, 2, 7
    path = written(tmp_path / "data", [with_map(1, values)])
    config = dataclasses.replace(SEGMENT, ignore=7, zero_is_ignored=True)
    dataset = read_dense_dataset(path, "--train", "mask", config, 2)
    assert dataset.pixels.tolist() == [800, 800] and set(dataset[0].map.ravel()) == {0, 1, 255}
