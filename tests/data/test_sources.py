"""Sources: datasets rejected at start-up, and reads at any index with few open files."""

import json
import os
import pickle
import resource
import struct
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from aimv2_jax.data.dataset_info import write_dataset
from aimv2_jax.data.records import BadRecord, decode, encode
from aimv2_jax.data.sources import Source
from aimv2_jax.errors import UserError


def open_files(folder):
    links = [Path("/proc/self/fd") / name for name in os.listdir("/proc/self/fd")]
    paths = map(os.path.realpath, links)
    return sorted(os.path.basename(path) for path in paths if path.startswith(folder))


def test_source_when_read_in_any_order_then_the_records_that_were_written(datasets, make_record):
    source = Source("red", datasets["red"])
    assert (len(source), source.kinds) == (13, {"alt": 13, "synthetic": 13})
    assert len(source.info.shards) == 3
    for i in (12, 0, 5, 6, 5):
        assert source.read(i) == encode(make_record("red", i))


def test_source_when_index_is_outside_then_our_bug(datasets):
    for index in (-1, 13):
        with pytest.raises(IndexError):
            Source("red", datasets["red"]).read(index)


def test_reads_leave_no_shard_open(make_dataset):
    """Reads of many shards leave none of them open; only the index stays open."""
    folder = make_dataset("many", 30, shard_bytes=1)
    source = Source("many", folder)
    for i in range(30):
        source.read(i)
        assert open_files(folder) == ["records.index"]


def test_reads_from_several_threads(make_dataset, make_record):
    """Each of many threads gets the record that it asked for."""
    source = Source("red", make_dataset("red", 10, shard_bytes=1))
    wanted = [encode(make_record("red", i)) for i in range(10)]
    with ThreadPoolExecutor(8) as pool:
        read = list(pool.map(source.read, [(7 * i) % 10 for i in range(2000)]))
    assert read == [wanted[(7 * i) % 10] for i in range(2000)]


FEW_FILES = """
import os, resource, sys

resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))
from concurrent.futures import ThreadPoolExecutor
from aimv2_jax.data.dataset_info import write_dataset
from aimv2_jax.data.records import Record, decode
from aimv2_jax.data.sources import open_datasets

folders = [sys.argv[1] + f"/{name}" for name in ("a", "b", "c")]
for folder in folders:
    write_dataset(folder, (Record(str(i), b"picture", {"alt": "a"}) for i in range(700)), shard_bytes=1)
sources = list(open_datasets({os.path.basename(folder): folder for folder in folders}).values())
assert sum(len(source.info.shards) for source in sources) == 2100
with ThreadPoolExecutor(32) as pool:
    jobs = [(source, i * 263 % 700) for i in range(700) for source in sources] * 2
    keys = list(pool.map(lambda job: decode(job[0].read(job[1])).key, jobs))
assert keys == [str(i) for _, i in jobs]
print(len(os.listdir("/proc/self/fd")))
"""


def test_2100_shards_are_read_with_64_open_files(tmp_path):
    """Threads read 2,100 shards in any order where a process may have 64 open files."""
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run([sys.executable, "-c", FEW_FILES, tmp_path], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 20


def test_shard_when_the_process_may_open_no_more_files_then_user_error_and_no_bad_record(make_dataset):
    source = Source("red", make_dataset("red", 3))
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (3, hard))  # The standard streams use all three.
    try:
        with pytest.raises(UserError, match=r"too many files are open .*ulimit -n"):
            source.read(1)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert decode(source.read(1)).key == "red/1"


def test_source_when_pickled_after_a_read_then_reads_the_same(datasets):
    source = Source("red", datasets["red"])
    data = source.read(3)
    assert pickle.loads(pickle.dumps(source)).read(3) == data


def test_damaged_record_is_corrupt(tmp_path, make_record):
    """A flipped bit spoils its own record and no other."""
    info = write_dataset(tmp_path, (make_record("red", i) for i in range(4)))
    shard = tmp_path / info.shards[0].file
    damaged = bytearray(shard.read_bytes())
    damaged[damaged.find(encode(make_record("red", 2))) + 40] ^= 1
    shard.write_bytes(damaged)
    source = Source("red", str(tmp_path))
    for index in (0, 1, 3):
        assert decode(source.read(index)).key == f"red/{index}"
    with pytest.raises(BadRecord, match="corrupt_record"):
        decode(source.read(2))


@pytest.mark.parametrize("entry", [0, 2**32 - 1])
def test_damaged_index_entry_is_a_bad_record(tmp_path, make_record, entry):
    """An impossible entry of the index spoils the records beside it and no other."""
    write_dataset(tmp_path, (make_record("red", i) for i in range(6)))
    with (tmp_path / "records.index").open("r+b") as file:
        file.seek(4 * 3)
        file.write(struct.pack("<I", entry))
    source = Source("red", str(tmp_path))
    for index in (0, 1, 2, 5):
        assert decode(source.read(index)).key == f"red/{index}"
    with pytest.raises(BadRecord, match="unreadable_record"):
        source.read(3)


def damage(**changes):
    def change(folder):
        file = folder / "dataset.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | changes))

    return change


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (lambda folder: [path.unlink() for path in folder.iterdir()], "is empty"),
        (lambda folder: (folder / "dataset.json").unlink(), "no dataset.json"),
        (lambda folder: (folder / "dataset.json").write_text("{"), "cannot be read"),
        (lambda folder: (folder / "dataset.json").write_text("[]"), "cannot be read"),
        (damage(format_version=9), "newer than this program's 4: 9"),
        (damage(format_version=9, shards="of another kind"), "newer than this program's 4: 9"),
        (damage(format_version=3, shards="of another kind"), "older than this program's 4: 3. Convert it: python -m"),
        (damage(records=float("inf")), "cannot be read"),
        (lambda folder: (folder / "dataset.json").write_text("[" * 100_000), "cannot be read"),
        (damage(records=0, shards=[]), "no records"),
        (damage(records=7), "counts 7 records, and 1 in its shards"),
        (damage(records=-1, shards=[{"file": "00000.bag", "records": -1, "bytes": 0}]), "cannot be read"),
        (damage(records=2**63, shards=[{"file": "x", "records": 2**63, "bytes": 0}]), "cannot be read"),
        (damage(records_with={"alt": 2, "synthetic": 1}), "cannot be read"),
        (damage(records_with={"alt": 1}), "cannot be read"),
        (lambda folder: os.truncate(folder / "dataset.json", 65 << 20), "cannot be read"),
        (lambda folder: ((folder / "dataset.json").unlink(), os.mkfifo(folder / "dataset.json")), "no dataset.json"),
        (lambda folder: (folder / "00000.bag").unlink(), "1 of its files are missing: '00000.bag'"),
        (lambda folder: (folder / "records.index").unlink(), "1 of its files are missing: 'records.index'"),
        (lambda folder: os.truncate(folder / "00000.bag", 9), "a file has 9 bytes, and dataset.json says"),
        (lambda folder: os.truncate(folder / "records.index", 9), "a file has 9 bytes, and dataset.json says 4: "),
        (
            damage(shards=[{"file": "00000.arrayrecord", "records": 1, "bytes": 1}]),
            "1 of its shards are not .bag files: '00000.arrayrecord'. Copy the whole dataset again, or convert it",
        ),
    ],
)
def test_source_when_the_folder_is_not_a_data_set_then_a_user_error_says_why(tmp_path, make_record, harm, message):
    write_dataset(tmp_path, [make_record("red", 0)])
    harm(tmp_path)
    with pytest.raises(UserError, match="config data source 'red'") as error:
        Source("red", str(tmp_path))
    assert message in str(error.value)


def test_source_when_there_is_no_folder_then_a_user_error_names_it():
    with pytest.raises(UserError, match="no such folder: '/nowhere/at/all'"):
        Source("red", "/nowhere/at/all")
