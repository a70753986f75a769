"""Data identity depends on shard sizes and the content of some records, not on names and paths."""

import json
import shutil
from pathlib import Path

import pytest

from aimv2_jax.data.dataset_info import write_dataset
from aimv2_jax.data.identity import differences, digest, identify
from aimv2_jax.data.sources import Source


def identity_of(folder, tokenizer="0123456789abcdef"):
    return identify({"red": Source("red", str(folder))}, tokenizer)


def test_identity_when_a_folder_is_copied(make_dataset, tmp_path):
    folder = make_dataset("red", 40)
    one, other = identity_of(folder), identity_of(shutil.copytree(folder, tmp_path / "elsewhere"))
    assert one == other and digest(one) == digest(other) and not list(differences(one, other))
    assert json.loads(json.dumps(one)) == one
    assert list(one["sources"]["red"]["sampled"]) == [str(39 * i // 15) for i in range(16)]


def test_identity_when_records_are_few(make_dataset):
    assert list(identity_of(make_dataset("red", 3))["sources"]["red"]["sampled"]) == ["0", "1", "2"]
    assert list(identity_of(make_dataset("red", 1))["sources"]["red"]["sampled"]) == ["0"]


REWORDED = {"alt": "RED number 0", "synthetic": "A picture of red, the 0th."}  # As long as before.


@pytest.mark.parametrize(
    ("size", "changes", "shard_bytes", "sides"),
    [
        (50, {}, 10_000, ["60 records", "50 records"]),
        (60, {}, 1, ["shards", "60 shards"]),
        (60, {0: {"captions": REWORDED}}, 10_000, ["record 0 with digest", "record 0 with digest"]),
        (60, {30: {"image": b"x" * 100_000}}, 10_000, ["sizes of shards", "sizes of shards"]),
    ],
)
def test_identity_when_data_differs(make_dataset, size, changes, shard_bytes, sides):
    one, other = identity_of(make_dataset("red", 60)), identity_of(make_dataset("red", size, changes, shard_bytes))
    [(name, *described)] = differences(one, other)
    assert name == "data source 'red'" and described[0] != described[1] and digest(one) != digest(other)
    assert all(part in text for part, text in zip(sides, described, strict=True))


def test_identity_when_records_are_reversed(make_record, tmp_path):
    records = [make_record("red", i) for i in range(60)]
    for name, order in (("a", records), ("b", records[::-1])):
        write_dataset(tmp_path / name, order)
    [(name, one, other)] = differences(identity_of(tmp_path / "a"), identity_of(tmp_path / "b"))
    assert name == "data source 'red'" and one.startswith("record 0 ") and one != other


def test_identity_when_the_tokenizer_differs(make_dataset):
    folder = make_dataset("red", 3)
    one, other = identity_of(folder), identity_of(folder, "fedcba9876543210" * 4)
    assert list(differences(one, other)) == [("the tokenizer", "digest 0123456789abcdef", "digest fedcba9876543210")]


def test_identity_when_a_sampled_record_is_damaged(make_dataset, tmp_path):
    """An unreadable record is replaced in training; bit rot on one host does not change the identity."""
    folder = make_dataset("red", 20, shard_bytes=1)
    copy = Path(shutil.copytree(folder, tmp_path / "copy"))
    file = copy / "00000.bag"
    damaged = bytearray(file.read_bytes())
    damaged[100] ^= 1
    file.write_bytes(damaged)
    one, other = identity_of(folder), identity_of(copy)
    assert other["sources"]["red"]["sampled"]["0"] is None and one["sources"]["red"]["sampled"]["0"]
    assert not list(differences(one, other)) and not list(differences(other, one))
