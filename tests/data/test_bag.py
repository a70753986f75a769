"""Bag files are readable by others: by Google DeepMind's bagz, and by a few lines that need nothing but `struct`."""

import itertools
import json
import struct
from pathlib import Path

import pytest

from aimv2_jax.data.records import decode, encode
from aimv2_jax.data.sources import Source


@pytest.fixture(scope="module")
def folder(make_dataset):
    """A dataset of several shards."""
    folder = Path(make_dataset("red", 13))
    assert len(list(folder.glob("*.bag"))) > 1
    return folder


@pytest.fixture(scope="module")
def records(folder):
    source = Source("red", str(folder))
    return [source.read(index) for index in range(len(source))]


def read_set(folder):
    """All records of a dataset in order, read by the standard library alone."""
    for shard in json.loads((folder / "dataset.json").read_text())["shards"]:
        with open(folder / shard["file"], "rb") as file:
            file.seek(-8, 2)
            start_of_ends = struct.unpack("<Q", file.read(8))[0]  # The last record ends where the ends begin.
            file.seek(start_of_ends)
            ends = [end for (end,) in struct.iter_unpack("<Q", file.read())]
            for start, end in itertools.pairwise((0, *ends)):
                file.seek(start)
                yield file.read(end - start)


def test_bag_files_need_only_struct(folder, records):
    """Ten lines of the standard library read the same records, so a platform without bagz's wheels can, too."""
    assert list(read_set(folder)) == records
    assert [encode(decode(record)) for record in records] == records


def test_bag_files_are_read_by_bagz(folder, records):
    """Google DeepMind's library reads the same records, of each shard and of all of them together."""
    bagz = pytest.importorskip("bagz")  # Has no wheels for Linux on ARM.
    paths = sorted(map(str, folder.glob("*.bag")))
    assert [record for path in paths for record in bagz.Reader(path)] == records
    together = bagz.Reader(",".join(paths))
    assert len(together) == len(records) and together[5] == records[5] and list(together) == records


def test_bag_files_of_bagz_are_read_by_us(tmp_path, records):
    """A file that Google DeepMind's library writes is byte for byte that of ours."""
    bagz = pytest.importorskip("bagz")
    from aimv2_jax.data.bag import BagWriter

    with bagz.Writer(str(tmp_path / "theirs.bag")) as theirs:
        for record in records:
            theirs.write(record)
    ours = BagWriter(tmp_path / "ours.bag")
    for record in records:
        ours.write(record)
    ours.close()
    assert (tmp_path / "theirs.bag").read_bytes() == (tmp_path / "ours.bag").read_bytes()
