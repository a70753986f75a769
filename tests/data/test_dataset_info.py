"""Datasets: written completely or not at all, with exact counts."""

import dataclasses
import itertools
import json
import math
import struct
import zlib

import numpy as np
import pytest

from aimv2_jax.data import bag
from aimv2_jax.data.dataset_info import DatasetInfo, write_dataset
from aimv2_jax.data.dataset_stats import ASPECT, SIDE, DatasetStats
from aimv2_jax.data.record_index import write_index
from aimv2_jax.data.records import decode, encode
from aimv2_jax.data.shards import Shard, ShardWriter, move_into
from aimv2_jax.errors import UserError
from tests.helpers.datasets import encoded


def test_dataset_when_written_then_holds_the_records_in_order_and_counts_them(tmp_path, make_record):
    records = [make_record("red", i) for i in range(9)]
    records[4] = dataclasses.replace(records[4], captions={"alt": "only"}, labels={"coarse": "x"})
    size = len(encode(records[0]))
    info = write_dataset(tmp_path, iter(records), shard_bytes=3 * size)
    assert len(info.shards) > 2
    assert info == DatasetInfo.from_json((tmp_path / "dataset.json").read_text())
    assert (info.records, info.kinds, info.labels) == (9, {"alt": 9, "synthetic": 8}, ("coarse", "number"))
    assert info.records_with == info.kinds
    assert info.bytes == sum((tmp_path / shard.file).stat().st_size for shard in info.shards)
    read = []
    for shard in info.shards:
        data = (tmp_path / shard.file).read_bytes()
        ends = struct.unpack(f"<{shard.records}Q", data[-8 * shard.records :])
        read += [decode(data[start:end]) for start, end in itertools.pairwise((0, *ends))]
    assert read == records


def test_dataset_counts_captions_and_the_records_that_have_them(tmp_path, make_record):
    texts = [{"alt": "x"}, {"alt": "x", "synthetic": ["a", "b"]}, {"synthetic": ["c"]}, {"synthetic": [], "alt": "x"}]
    info = write_dataset(tmp_path, (make_record("red", i, captions=found) for i, found in enumerate(texts)))
    assert (info.kinds, info.records_with) == ({"alt": 3, "synthetic": 3}, {"alt": 3, "synthetic": 2})
    assert info == DatasetInfo.from_json((tmp_path / "dataset.json").read_text())


def test_dataset_histograms_count_decodable_images(tmp_path, make_record):
    """The histograms of a written dataset count the images that have a size."""
    records = [make_record("red", i) for i in range(9)] + [make_record("red", 9, image=b"none")]
    info = write_dataset(tmp_path, records)
    assert {name: sum(histogram.counts) for name, histogram in info.histograms.items()} == {
        "shorter_side_px": 9,
        "aspect": 9,
    }
    side = info.histograms["shorter_side_px"]
    assert side.edges[:4] == (16, 24, 32, 48) and side.counts[:1] == (0,) and sum(side.counts[:4]) == 9


def test_dataset_of_another_format_is_refused(tmp_path, make_record):
    """A dataset.json of an older or newer format, or without a number as format, is refused by its value."""
    tree = json.loads(write_dataset(tmp_path, [make_record("red", 0)]).to_json())
    for version in (0, 3, 5, "4", None):
        with pytest.raises(ValueError, match=f"version {version}"):
            DatasetInfo.from_json(json.dumps(tree | {"format_version": version}))


def test_dataset_index_has_all_ends_in_order(tmp_path, make_record):
    """The index holds the end of every record in its shard, and dataset.json the index's CRC-32."""
    records = [encode(make_record("red", i)) for i in range(40)]
    info = write_dataset(tmp_path, map(decode, records), shard_bytes=1)
    assert len(info.shards) == 40  # More shards than are read at once.
    index = (tmp_path / "records.index").read_bytes()
    assert struct.unpack("<40I", index) == tuple(map(len, records))
    assert info.index_crc32 == zlib.crc32(index)
    info = write_dataset(tmp_path / "one", map(decode, records[:3]))
    index = (tmp_path / "one/records.index").read_bytes()
    assert struct.unpack("<3I", index) == tuple(itertools.accumulate(map(len, records[:3])))


def test_dataset_index_of_a_damaged_shard(tmp_path, make_record):
    """A shard that is cut or has other ends gets no index, and leaves no part of one."""
    info = write_dataset(tmp_path / "set", [make_record("red", i) for i in range(9)])
    (tmp_path / "index").mkdir()
    shard = tmp_path / "set/00000.bag"
    good = shard.read_bytes()
    for data, error in ((good[:-8], OSError), (good[:-8] + bytes(8), ValueError)):
        shard.write_bytes(data)
        with pytest.raises(error):
            write_index(tmp_path / "set", info.shards, tmp_path / "index", move_into(tmp_path / "index"))
    assert not list((tmp_path / "index").iterdir())


def test_shard_ends_before_the_limit_of_bag_files(tmp_path, monkeypatch):
    """A record that would make a shard longer than a bag file may be begins the next shard."""
    monkeypatch.setattr(bag, "MAX_BYTES", 10)
    with ShardWriter(tmp_path, move_into(tmp_path), limit=100) as writer:
        for size in (4, 6, 1, 10):
            writer.write(bytes(size))
    assert writer.shards == [Shard(f"{n:05d}.bag", r, s) for n, (r, s) in enumerate([(2, 26), (1, 9), (1, 18)])]


@pytest.mark.parametrize(
    ("histogram", "change"),
    [
        (SIDE, None),
        (ASPECT, None),
        (SIDE, {"counts": [-1]}),
        (SIDE, {"counts": [10**30]}),
        (ASPECT, {"edges": [0]}),
        (ASPECT, {"edges": [math.nan]}),
        (ASPECT, {"edges": [1e300]}),
    ],
)
def test_dataset_when_its_histograms_cannot_be_true_then_refused(histogram, change):
    tree = json.loads(DatasetInfo.from_stats(DatasetStats(), [], 0, made={}).to_json())
    if change is None:
        del tree["histograms"][histogram]
    for name, first in (change or {}).items():
        tree["histograms"][histogram][name][:1] = first
    with pytest.raises(ValueError):
        DatasetInfo.from_json(json.dumps(tree))


def test_dataset_info_with_stats_json_round_trip():
    """A DatasetInfo with statistics of its preparation is read back from JSON as it was written."""
    stats = DatasetStats()
    stats.keep({"alt": "x"}, {"l": "y"}, (100, 50))
    stats.drop("too_small", "a")
    stats.change("caption_cut", "b")
    stats.lose("damaged_tar", 2, 512, "c")
    info = DatasetInfo.from_stats(stats, [Shard("0.bag", 1, 65536)], 7, {"min-side": 32, "max-side": None})
    assert info.samples == 4
    assert DatasetInfo.from_json(info.to_json()) == info


def test_dataset_when_written_twice_then_same_bytes(tmp_path, make_record):
    for name in ("a", "b"):
        write_dataset(tmp_path / name, (make_record("red", i) for i in range(5)), shard_bytes=6_000)
    files = sorted(path.name for path in (tmp_path / "a").iterdir())
    assert len(files) > 2
    for file in files:
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()


def test_dataset_when_the_records_fail_midway_then_no_part_of_a_shard_and_no_dataset(tmp_path, make_record):
    def records():
        for i in range(5):
            yield make_record("red", i)
        raise OSError("disk gone")

    with pytest.raises(OSError, match="disk gone"):
        write_dataset(tmp_path, records(), shard_bytes=len(encode(make_record("red", 0))))
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {f"{i:05d}.bag" for i in range(len(names))}


def test_dataset_when_the_folder_holds_one_then_refused(tmp_path, make_record):
    write_dataset(tmp_path, [make_record("red", 0)])
    before = (tmp_path / "dataset.json").read_bytes()
    with pytest.raises(UserError, match="the folder already holds a dataset"):
        write_dataset(tmp_path, [make_record("red", 1)])
    assert json.loads(before) == json.loads((tmp_path / "dataset.json").read_bytes())


def test_dataset_lists_classes_and_second_images(tmp_path, make_record):
    """dataset.json has the classes of a label in the order of their numbers, and counts second images by bits."""
    masks = [np.full((4, 5), value, dtype) for value, dtype in ((3, np.uint8), (7, np.uint8), (900, np.uint16))]
    records = [
        make_record("red", i, labels={"animal": name, "n": str(i)}, images={"mask": encoded(mask)})
        for i, (name, mask) in enumerate(zip("aba", masks))
    ]
    info = write_dataset(tmp_path, records, classes={"animal": ["b", "z", "a"], "unused": ["x"]})
    assert info == DatasetInfo.from_json((tmp_path / "dataset.json").read_text())
    assert [*info.classes.items()] == [("animal", {"b": 1, "z": 0, "a": 2}), ("n", {"0": 1, "1": 1, "2": 1})]
    assert list(info.classes["animal"]) == ["b", "z", "a"]
    count = info.images["mask"]
    assert (count.records, count.bits_8.count, count.bits_16.keys, count.max_value) == (3, 2, ("red/2",), 900)


def test_dataset_of_an_earlier_program_has_no_classes(tmp_path, make_record):
    """A dataset.json without classes and second images is read; one with others than counts is refused."""
    tree = json.loads(write_dataset(tmp_path, [make_record("red", 0)]).to_json())
    old = {name: value for name, value in tree.items() if name not in ("classes", "images")}
    assert DatasetInfo.from_json(json.dumps(old)).classes == {}
    for classes in ({"l": {"a": -1}}, {"l": ["a"]}, ["l"], {"l": {"a": "1"}}):
        with pytest.raises((ValueError, AttributeError)):
            DatasetInfo.from_json(json.dumps(tree | {"classes": classes}))
