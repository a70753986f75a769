"""Sources: datasets rejected at start-up, and reads at any index with few open files."""

import json
import os
import pickle
import resource
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from aimv2_jax.data import sources
from aimv2_jax.data.dataset_info import write_dataset
from aimv2_jax.data.records import BadRecord, decode, encode
from aimv2_jax.data.sources import Source, open_datasets
from aimv2_jax.errors import UserError


def open_shards(folder):
    links = [Path("/proc/self/fd") / name for name in os.listdir("/proc/self/fd")]
    return sum(os.path.realpath(link).startswith(folder) for link in links)


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


def test_source_when_there_are_many_shards_then_none_is_open_at_start_and_few_later(make_dataset, monkeypatch):
    folder = make_dataset("many", 30, shard_bytes=1)
    monkeypatch.setattr(sources, "MAX_OPEN_SHARDS", 4)
    source = Source("many", folder)
    assert len(source.info.shards) == 30
    assert open_shards(folder) == 0
    for i in range(30):
        source.read(i)
        assert open_shards(folder) == min(i + 1, 4)


def test_source_when_shards_are_dropped_while_threads_read_then_every_read_is_right(
    make_dataset, make_record, monkeypatch
):
    monkeypatch.setattr(sources, "MAX_OPEN_SHARDS", 2)
    source = Source("red", make_dataset("red", 10, shard_bytes=1))
    wanted = [encode(make_record("red", i)) for i in range(10)]
    with ThreadPoolExecutor(8) as pool:
        read = list(pool.map(source.read, [(7 * i) % 10 for i in range(2000)]))
    assert read == [wanted[(7 * i) % 10] for i in range(2000)]


def test_sources_when_there_are_several_then_they_share_the_bound(make_dataset, monkeypatch):
    monkeypatch.setattr(sources, "MAX_OPEN_SHARDS", 4)
    folders = [make_dataset(name, 6, shard_bytes=1) for name in ("one", "two")]
    pair = list(open_datasets({Path(folder).name: folder for folder in folders}).values())
    for i in range(6):
        for source in pair:
            source.read(i)
            assert sum(map(open_shards, folders)) <= 4


def test_shards_when_opening_takes_long_then_several_open_at_once_and_each_once(make_dataset, monkeypatch):
    source, opened, plain = Source("red", make_dataset("red", 8, shard_bytes=1)), [], sources._open

    def open_slowly(path):
        opened.append(path)
        time.sleep(0.1)
        return plain(path)

    monkeypatch.setattr(sources, "_open", open_slowly)
    start = time.monotonic()
    with ThreadPoolExecutor(16) as pool:
        list(pool.map(source.read, [i % 8 for i in range(16)]))
    assert time.monotonic() - start < 0.4  # Serial opening would take 0.8 s.
    assert len(opened) == len(set(opened)) == 8


FEW_FILES = """
import os, resource, sys

resource.setrlimit(resource.RLIMIT_NOFILE, (512, 512))
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


def test_sources_when_2000_shards_are_read_with_512_open_files_allowed_then_all_is_read(tmp_path):
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run([sys.executable, "-c", FEW_FILES, tmp_path], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 512 // 4 + 20


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


def test_source_when_a_shard_is_damaged_then_its_records_are_unreadable_and_others_are_not(tmp_path, make_record):
    info = write_dataset(tmp_path, (make_record("red", i) for i in range(4)), shard_bytes=1)
    shard = tmp_path / info.shards[2].file
    damaged = bytearray(shard.read_bytes())
    start = damaged.find(encode(make_record("red", 2)))
    assert start > 0
    damaged[start + 40] ^= 1
    shard.write_bytes(damaged)
    (tmp_path / info.shards[3].file).write_bytes(b"")
    source = Source("red", str(tmp_path))
    assert decode(source.read(1)).key == "red/1"
    for index in (2, 3):
        with pytest.raises(BadRecord, match="unreadable_record"):
            source.read(index)


def test_read_of_a_shard_with_uncounted_records_is_refused(tmp_path, make_record):
    write_dataset(tmp_path, (make_record("red", i) for i in range(65)))
    damage(records=3, shards=[{"file": "00000.arrayrecord", "records": 3, "bytes": 1}])(tmp_path)
    with pytest.raises(UserError, match=r"holds 65 records, and dataset.json says 3: '.*00000.arrayrecord'"):
        Source("red", str(tmp_path)).read(0)


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
        (damage(format_version=9), "newer than this program's 3: 9"),
        (damage(format_version=9, shards="of another kind"), "newer than this program's 3: 9"),
        (damage(format_version=0, shards="of another kind"), "older than this program reads: 0"),
        (damage(records=float("inf")), "cannot be read"),
        (lambda folder: (folder / "dataset.json").write_text("[" * 100_000), "cannot be read"),
        (damage(records=0, shards=[]), "no records"),
        (damage(records=7), "counts 7 records, and 1 in its shards"),
        (damage(records=-1, shards=[{"file": "00000.arrayrecord", "records": -1, "bytes": 0}]), "cannot be read"),
        (damage(records=2**63, shards=[{"file": "x", "records": 2**63, "bytes": 0}]), "cannot be read"),
        (damage(records_with={"alt": 2, "synthetic": 1}), "cannot be read"),
        (damage(records_with={"alt": 1}), "cannot be read"),
        (lambda folder: os.truncate(folder / "dataset.json", 65 << 20), "cannot be read"),
        (lambda folder: ((folder / "dataset.json").unlink(), os.mkfifo(folder / "dataset.json")), "no dataset.json"),
        (lambda folder: (folder / "00000.arrayrecord").unlink(), "1 of its shards are missing: '00000.arrayrecord'"),
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
