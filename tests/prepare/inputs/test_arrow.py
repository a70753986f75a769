"""Reading of Arrow streams, intact and damaged."""

from __future__ import annotations

import json

import pyarrow
import pytest

from aimv2_jax.errors import UserError
from aimv2_jax.prepare.inputs import discover, file_sets, open_files, reader
from aimv2_jax.prepare.inputs.samples import MapFile, OutOfRange, Sample
from tests.helpers.labelled_sets import IMAGE, LABEL, save_to_disk, table
from tests.helpers.small_inputs import image_bytes, lost, read_all

FEATURES = {"image": IMAGE, "mask": IMAGE, "label": LABEL}


def columns(count):
    return {
        "image": [image_bytes(number) for number in range(count)],
        "mask": [b"mask %d" % number if number else None for number in range(count)],
        "label": [number % 6 - 1 for number in range(count)],
        "text": [f"text {number}" for number in range(count)],
        "words": [["a", "b"]] * count,
        "ignored": [{"x": 1}] * count,
    }


def shard(path):
    [found] = discover.find_shards([str(path)])
    return found


@pytest.fixture
def stream(tmp_path):
    """The Arrow file of a saved dataset of 70 rows, in batches of 20."""
    [path] = save_to_disk(tmp_path / "set", table(FEATURES, columns(70)), batch_rows=20)
    return path


def test_stream_when_read_then_a_sample_a_row(stream):
    """Rows have their images and fields, and the names of their classes."""
    found = shard(stream)
    assert (found.kind, found.num_bytes) == ("arrow", stream.stat().st_size)
    assert reader.find_fields(found) == ["label", "text", "words"]
    assert reader.FORMATS["arrow"].maps(found) == ["mask"]
    assert reader.declared_classes(found) == {"label": tuple(LABEL["names"])}
    samples = list(reader.read(found, maps=["mask"]))
    stem, words = stream.stem, ["a", "b"]
    assert len(samples) == 70
    maps = {"mask": MapFile(None)}
    assert samples[0] == Sample(f"{stem}/0", image_bytes(0), {"text": "text 0", "words": words}, maps=maps)
    assert samples[67].fields == {"label": "vehicle" if 67 % 6 == 1 else LABEL["names"][67 % 6 - 1]} | {
        "text": "text 67",
        "words": words,
    }
    assert samples[5].fields["label"] == OutOfRange(4) and samples[67].maps == {"mask": MapFile(b"mask 67")}
    assert list(reader.read(found, ["text"]))[9] == Sample(f"{stem}/9", image_bytes(9), {"text": "text 9"})


def test_stream_without_images_is_refused(tmp_path):
    """A stream without a column of images is refused with its columns; one in a bare folder is read."""
    [path] = save_to_disk(tmp_path / "set", table({"label": LABEL}, {"label": [1]}))
    with pytest.raises(UserError, match=r"no column of images .*'label'"):
        shard(path)
    [path] = save_to_disk(tmp_path / "other", table({"photo": IMAGE}, {"photo": [image_bytes(0)]}))
    assert [sample.image for sample in read_all(shard(path))[0]] == [image_bytes(0)]


@pytest.mark.parametrize("cut", [4, 8, 100, 0.3, 0.7, 0.99])
def test_truncated_stream_is_damaged(stream, cut):
    """A stream that is cut keeps its whole batches, and the rest is damage of an unknown number of samples."""
    data = stream.read_bytes()
    stream.write_bytes(data[: int(cut * len(data)) if isinstance(cut, float) else -cut])
    samples, [bad] = read_all(shard(stream))
    assert len(samples) in (0, 20, 40, 60, 70) and [sample.image for sample in samples] == [
        image_bytes(number) for number in range(len(samples))
    ]
    assert (bad.reason, bad.samples, bad.key) == ("damaged_arrow", 0, f"{stream.stem}/{len(samples)}")


def test_damage_never_ends_the_reading(tmp_path):
    """Bytes that are changed anywhere never raise: rows are samples or lost."""
    small = columns(12) | {"image": [b"%d" % number for number in range(12)]}
    [stream] = save_to_disk(tmp_path / "set", table(FEATURES, small), batch_rows=4)
    data = stream.read_bytes()
    for start in range(0, len(data), 61):
        damaged = bytearray(data)
        damaged[start : start + 16] = bytes(255 - byte for byte in data[start : start + 16])
        stream.write_bytes(damaged)
        try:
            samples, bad = read_all(shard(stream))
        except UserError as error:  # The schema is damaged, but readable.
            assert "images" in str(error)
            continue
        assert len(samples) + lost(bad) == 12 or any(entry.reason == "damaged_arrow" for entry in bad)


def test_batch_with_damaged_offsets_is_lost_alone(stream):
    """A batch whose texts are not UTF-8 is lost with its number of rows, and the next ones are read."""
    stream.write_bytes(stream.read_bytes().replace(b"text 25", b"\xff\xff\xff\xff 25"))
    samples, [bad] = read_all(shard(stream))
    assert [sample.fields["text"] for sample in samples] == [f"text {n}" for n in (*range(20), *range(40, 70))]
    assert (bad.reason, bad.samples, bad.key) == ("damaged_arrow", 20, f"{stream.stem}/20")


def test_stream_that_unpacks_to_much(stream, monkeypatch):
    """Rows beyond the allowed size are left out, and it is said."""
    monkeypatch.setattr(open_files, "max_unpacked_bytes", lambda num_bytes: 10_000)
    samples, [bad] = read_all(shard(stream))
    assert 0 < len(samples) < 20 and bad.reason == "decompression_bomb"


def test_caches_beside_a_saved_dataset_are_left_out(stream):
    """Files that state.json does not name are caches; without it, every stream is read."""
    (stream.parent / "cache-0123.arrow").write_bytes(stream.read_bytes())
    for given in (stream.parent, f"{stream.parent}/*.arrow"):
        assert [found.path for found in discover.find_shards([str(given)])] == [str(stream)]
    (stream.parent / "state.json").write_text("{")
    assert len(discover.find_shards([str(stream.parent)])) == 2


@pytest.mark.parametrize("names", [None, [], ["a", "a"], ["a", 3], "ab", [""], ["\ud800"]])
def test_classes_that_cannot_be_true_stay_numbers(tmp_path, names):
    """Names that are missing, repeated or no texts would merge classes: then the label is the number."""
    feature = {"_type": "ClassLabel", "names": names}
    rows = table({"label": feature}, {"image": [image_bytes(0)], "label": [7]})
    [path] = save_to_disk(tmp_path / "set", rows)
    [sample] = reader.read(shard(path))
    assert sample.fields == {"label": 7} and reader.declared_classes(shard(path)) == {}


@pytest.mark.parametrize("metadata", [b"{", b"[]", b'{"info": 3}', b'{"info": {"features": []}}', b"\xff"])
def test_metadata_that_is_damaged_has_no_features(tmp_path, metadata):
    """Damaged metadata of Hugging Face leave the columns as they are."""
    rows = pyarrow.table({"image": [image_bytes(0)], "label": [7]}).replace_schema_metadata({"huggingface": metadata})
    [path] = save_to_disk(tmp_path / "set", rows)
    assert [sample.fields for sample in reader.read(shard(path))] == [{"label": 7}]


def test_splits_of_a_damaged_dict(tmp_path, stream):
    """A DatasetDict that names no splits, or one that is missing, is refused."""
    for splits, says in (({}, "names no splits"), ({"splits": ["a/b"]}, "names no splits")):
        (tmp_path / "dataset_dict.json").write_text(json.dumps(splits))
        with pytest.raises(UserError, match=says):
            discover.find_shards([str(tmp_path)])
    (tmp_path / "dataset_dict.json").write_text(json.dumps({"splits": ["set", "test"]}))
    with pytest.raises(UserError, match=r"split test has no state\.json"):
        discover.find_shards([str(tmp_path)], split="test")
    (tmp_path / "dataset_dict.json").write_text(json.dumps({"splits": ["set"]}))
    assert [found.path for found in discover.find_shards([str(tmp_path)])] == [str(stream)]


@pytest.mark.parametrize(
    ("names", "split", "expected"),
    [
        (["train-00000-of-00001.parquet", "test.parquet"], "test", ["test.parquet"]),
        (["a/train/0.tar", "a/test/0.tar"], "train", ["a/train/0.tar"]),
        (["train/train-0.tar", "training/0.tar", "pretrain.tar"], "train", ["train/train-0.tar"]),
        (["0.csv", "1.csv"], "train", ["0.csv", "1.csv"]),
    ],
)
def test_files_of_a_split(names, split, expected):
    """A split's files have its name, or a folder has; where none has, rows have to be selected."""
    paths, is_named = file_sets.select([f"/folder/{name}" for name in names], "/folder", split, False)
    assert (paths, is_named) == ([f"/folder/{name}" for name in expected], len(expected) < len(names))
