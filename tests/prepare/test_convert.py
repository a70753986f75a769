"""Datasets of older versions, in ArrayRecord files, are converted to bag files record by record."""

import json
import os
import re
import shutil
import sys
from pathlib import Path

import pytest
from array_record.python.array_record_module import ArrayRecordWriter

from aimv2_jax.data.dataset_info import DatasetInfo, write_dataset
from aimv2_jax.data.dataset_stats import SampleCount
from aimv2_jax.data.records import BadRecord, encode
from aimv2_jax.data.sources import Source
from aimv2_jax.errors import UserError
from aimv2_jax.prepare import convert as conversion
from aimv2_jax.prepare.convert import convert, main
from aimv2_jax.prepare.output import OutputFolder
from tests.helpers.buckets import clients_of

SIZES = (4, 1, 6)  # Records of the shards.


@pytest.fixture(scope="module")
def records(make_record):
    texts = {"alt": "A thing.", "synthetic": ["One.", "Two."]}
    return [make_record("red", n, **({"captions": texts} if n == 2 else {})) for n in range(sum(SIZES))]


@pytest.fixture
def old(tmp_path, records):
    def old(version=3, folder="old", **changes):
        """A dataset as format 2 or 3 had it: by array_record itself, with the same counts."""
        info = write_dataset(tmp_path / "counts", records)
        shutil.rmtree(tmp_path / "counts")
        (tmp_path / folder).mkdir()
        shards, left = [], iter(records)
        for number, size in enumerate(SIZES):
            path = tmp_path / folder / f"{number:05d}-00000.arrayrecord"
            writer = ArrayRecordWriter(str(path), "group_size:1,uncompressed")
            for _ in range(size):
                writer.write(encode(next(left)))
            writer.close()
            shards.append({"file": path.name, "records": size, "bytes": path.stat().st_size})
        tree = json.loads(info.to_json()) | {"format_version": version, "shards": shards, "made": {"min-side": 32}}
        tree["bytes"] = sum(shard["bytes"] for shard in shards)
        del tree["index_crc32"]
        if version == 2:
            tree["kinds"] = tree.pop("records_with")
        (tmp_path / folder / "dataset.json").write_text(json.dumps(tree | changes))
        return tmp_path / folder

    return old


def read_all(folder):
    source = Source("set", str(folder))
    return [source.read(index) for index in range(len(source))]


def refused(capsys, *arguments):
    assert main([*map(str, arguments), "--workers", "1"]) == 2
    said = capsys.readouterr().err
    assert re.fullmatch(r"error: .*\.\n", said), said
    return said


@pytest.mark.parametrize("version", [2, 3])
def test_convert_keeps_records_shards_and_counts(old, records, tmp_path, capsys, version):
    """Each record is the same, in the same order and shard, and dataset.json counts as before."""
    folder = old(version)
    assert main([str(folder), str(tmp_path / "new"), "--workers", "1"]) == 0
    assert capsys.readouterr().out.startswith("11 records of 11 samples in 3 shards, ")
    assert read_all(tmp_path / "new") == [encode(record) for record in records]
    before = json.loads((folder / "dataset.json").read_text())
    info = DatasetInfo.from_json((tmp_path / "new/dataset.json").read_text())
    assert [(shard.file, shard.records) for shard in info.shards] == [
        (f"{number:05d}-00000.bag", size) for number, size in enumerate(SIZES)
    ]
    assert (info.kinds, info.samples, list(info.labels)) == (before["kinds"], 11, before["labels"])
    assert info.records_with == before.get("records_with", before["kinds"]) == {"alt": 11, "synthetic": 11}
    assert info.made["min-side"] == 32 and info.made["converted"]["format_version"] == version
    assert {path.name for path in (tmp_path / "new").iterdir()} == {
        "dataset.json",
        "records.index",
        *(shard.file for shard in info.shards),
    }


def test_convert_from_bucket_to_bucket(old, tmp_path, fake_gcs, gcs_folder, upload, objects_of, files_of):
    """From a bucket into one, by two processes, the files are those from a disk to a disk."""
    folder = old()
    convert(str(folder), str(tmp_path / "new"))
    upload(fake_gcs, folder, f"{gcs_folder}/old")
    assert main([f"{gcs_folder}/old", f"{gcs_folder}/new", "--workers", "2"]) == 0
    assert objects_of(f"{gcs_folder}/new") == files_of(tmp_path / "new")
    with clients_of(fake_gcs):
        assert read_all(f"{gcs_folder}/new") == read_all(tmp_path / "new")


def test_convert_resumes(old, tmp_path, monkeypatch, files_of, capsys):
    """A conversion that fails midway continues with --resume, with the same files, and only for the same dataset."""
    folder = old()
    convert(str(folder), str(tmp_path / "straight"))
    add_file, added = OutputFolder.add_file, []

    def add(self, part, name):
        if len(added) == 1:
            raise OSError(28, "No space left on device", name)
        added.append(name)
        add_file(self, part, name)

    with monkeypatch.context() as patch:
        patch.setattr(OutputFolder, "add_file", add)
        assert "NEW cannot be used: No space left on device" in refused(capsys, folder, tmp_path / "new")
    assert not (tmp_path / "new/dataset.json").exists()
    kept = (tmp_path / "new" / added[0]).stat().st_mtime_ns
    assert "NEW contains an unfinished dataset" in refused(capsys, folder, tmp_path / "new")
    other = old(folder="other", samples=12)
    assert "OLD finds other files" in refused(capsys, other, tmp_path / "new", "--resume")
    for _ in range(2):  # The second time, all is done already.
        assert main([str(folder), str(tmp_path / "new"), "--workers", "1", "--resume"]) == 0
        assert files_of(tmp_path / "new") == files_of(tmp_path / "straight")
    assert (tmp_path / "new" / added[0]).stat().st_mtime_ns == kept
    assert "NEW already contains a dataset" in refused(capsys, folder, tmp_path / "new")


def test_convert_damaged_record_becomes_unusable(old, records, tmp_path, capsys):
    """A damaged record keeps its place as an unusable one, and is counted; all others are the same."""
    folder = old()
    path = folder / "00002-00000.arrayrecord"
    data = bytearray(path.read_bytes())
    position = data.index(encode(records[7])) + 50
    data[position] ^= 1
    path.write_bytes(data)
    info = convert(str(folder), str(tmp_path / "new"))
    assert info.changes == {"unreadable_record": SampleCount(1, ("00002-00000.arrayrecord, record 2",))}
    source = Source("set", str(tmp_path / "new"))
    with pytest.raises(BadRecord):
        source.read(7)
    assert [source.read(n) for n in range(11) if n != 7] == [encode(r) for n, r in enumerate(records) if n != 7]


def test_convert_failing_disk_is_no_damage(old, tmp_path):
    """Where the disk fails, conversion ends, in place of counting records as damaged."""
    folder = old()
    path = folder / "00001-00000.arrayrecord"
    path.unlink()
    path.symlink_to("/proc/self/mem")  # Fails with EIO where no memory is mapped (proc(5)).
    with pytest.raises(UserError, match=r"input cannot be read \(Input/output error\).*00001-00000"):
        convert(str(folder), str(tmp_path / "new"))


def test_convert_splits_what_exceeds_a_bag_file(old, records, tmp_path, monkeypatch):
    """A shard larger than a bag file may be becomes several, in order."""
    folder = old()
    monkeypatch.setattr("aimv2_jax.data.bag.MAX_BYTES", max(len(encode(record)) for record in records))
    info = convert(str(folder), str(tmp_path / "new"))
    assert len(info.shards) > len(SIZES) and info.shards[1].file == "00000-00001.bag"
    assert read_all(tmp_path / "new") == [encode(record) for record in records]


def test_convert_user_errors(old, tmp_path, capsys):
    """What cannot be converted is refused in one line, and nothing is made."""
    folder, new = old(), tmp_path / "new"
    assert f"No such file or directory): '{tmp_path}/none/dataset.json'" in refused(capsys, tmp_path / "none", new)
    assert "a format that cannot be converted (1)" in refused(capsys, old(1, "oldest"), new)
    assert "OLD: no such kind of storage: 'ftp://a/b'" in refused(capsys, "ftp://a/b", new)
    assert "NEW already contains a dataset" in refused(capsys, folder, folder)
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged/dataset.json").write_text("{")
    assert "OLD: dataset.json cannot be read" in refused(capsys, tmp_path / "damaged", new)
    assert not new.exists()
    (folder / "00001-00000.arrayrecord").write_bytes((folder / "00000-00000.arrayrecord").read_bytes())
    assert "a shard of OLD holds 4 records, and dataset.json says 1" in refused(capsys, folder, new)
    convert(str(old(folder="good")), str(tmp_path / "converted"))
    assert "OLD already has the format" in refused(capsys, tmp_path / "converted", tmp_path / "again")


def test_convert_needs_array_record(old, tmp_path, capsys, monkeypatch):
    """Without array_record, one line says how to install it."""
    monkeypatch.setitem(sys.modules, "array_record.python", None)
    assert "Install it: pip install array-record" in refused(capsys, old(), tmp_path / "new")


def test_quickstart_datasets_have_the_new_format():
    """The bundled datasets are bag files with an index; nothing of the old format is left beside them."""
    folders = [path.parent for path in (Path(conversion.__file__).parents[1] / "data/sample").rglob("dataset.json")]
    assert len(folders) == 4
    assert all(sorted(os.listdir(folder)) == ["00000.bag", "dataset.json", "records.index"] for folder in folders)
