"""Sources in buckets over the real protocol: the same records as on a disk, one request each, whatever fails."""

import json
import multiprocessing
import os
import pickle
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from aimv2_jax.data.sources import Source
from aimv2_jax.errors import StorageError, UserError
from aimv2_jax.storage import host_cache, retries
from aimv2_jax.storage.host_cache import HostCache
from aimv2_jax.storage.retries import DATA_RETRIES
from tests.helpers.buckets import clients_of, proxy
from tests.helpers.buckets import fake_gcs as fake_gcs
from tests.helpers.buckets import gcs_emulator as gcs_emulator
from tests.helpers.buckets import moto_s3 as moto_s3
from tests.helpers.full_disk import files_of_at_most

SIZE = 60
INDICES = [(17 * i) % SIZE for i in range(SIZE)]


@pytest.fixture(scope="session")
def local(make_dataset):
    """The local folder of a dataset of several shards."""
    return make_dataset("red", SIZE, shard_bytes=30_000)


@pytest.fixture(scope="session")
def expected(local):
    source = Source("red", local)
    return [source.read(index) for index in INDICES]


def upload(local, server):
    url = server.new_folder()
    for file in Path(local).iterdir():
        server.write(f"{url}/{file.name}", file.read_bytes())
    return url


@pytest.fixture
def proxied(fake_gcs):
    """fake-gcs-server behind the proxy, to which the clients of this process are pointed."""
    with proxy(fake_gcs) as server, clients_of(server):
        yield server


@pytest.fixture(autouse=True)
def believed_soon(monkeypatch):
    """An answer that only the user can change is believed after 2 s, not 8."""
    monkeypatch.setattr(retries, "_ANSWER_PATIENCE_S", 2.0)


@pytest.fixture
def cache(tmp_path):
    return HostCache(str(tmp_path / "cache"))


def object_reads(server):
    return server.counts()["requests"].get("GET read", 0)


def read_all(source):
    with ThreadPoolExecutor(8) as pool:
        return list(pool.map(source.read, INDICES))


@pytest.mark.parametrize("name", ["fake_gcs", "gcs_emulator", "moto_s3"])
def test_bucket_gives_the_records_of_the_disk(request, name, local, expected, cache):
    """A dataset in a bucket of GCS or S3 has the records of the one on a disk, also in another process."""
    server = request.getfixturevalue(name)
    with clients_of(server):
        source = Source("red", upload(local, server), cache=cache)
        assert (len(source), source.info) == (SIZE, Source("red", local).info)
        assert read_all(source) == expected
        assert [pickle.loads(pickle.dumps(source)).read(i) for i in INDICES[:3]] == expected[:3]


def test_record_is_one_request(proxied, local, expected, cache):
    """After the start each record costs one request and no byte more than it has."""
    source = Source("red", upload(local, proxied), cache=cache)
    before, sent = object_reads(proxied), proxied.counts()["bytes"]
    assert read_all(source) == expected
    assert object_reads(proxied) - before == SIZE
    received = {name: count - sent[name] for name, count in proxied.counts()["bytes"].items()}
    assert sum(map(len, expected)) <= max(received.values()) < 1.05 * sum(map(len, expected)) + 1000 * SIZE


@pytest.mark.parametrize("kind", ["429", "503", "reset", "cut", "short", "403", "404", "slow"])
def test_failures_change_no_record(proxied, local, expected, cache, kind):
    """With every fifth request failing all records are exact, and each retry of ours is counted."""
    url = upload(local, proxied)
    proxied.configure(seed=1, failures=0.2, kinds=[kind], slow_ms=50)
    source = Source("red", url, cache=cache)
    DATA_RETRIES.take()
    before = proxied.counts()["failures"].get(kind, 0)
    assert read_all(source) == expected
    failed, retried = proxied.counts()["failures"][kind] - before, DATA_RETRIES.take()
    if kind == "slow":
        assert failed > 0 and retried == 0
    elif kind == "reset":  # libcurl itself repeats a request on a connection that was closed while it was idle.
        assert 0 < retried <= failed
    else:
        assert 0 < retried == failed


def test_outage_ends_with_a_storage_error(proxied, local, cache):
    """A bucket that fails for long ends the run with the code for a restart, and answers again afterwards."""
    source = Source("red", upload(local, proxied), patience_s=0.3, cache=cache)
    proxied.configure(failures=1.0, kinds=["503"])
    with pytest.raises(StorageError, match=r"since 0 s: the bucket fails .*503"):
        source.read(0)
    proxied.configure(failures=0.0)
    source.read(0)


def test_index_is_copied_once_a_host(proxied, local, cache, monkeypatch):
    """Several processes and later starts share one copy of the index, made in ranges and whole at once."""
    monkeypatch.setattr(host_cache, "_COPY_BYTES", 64)
    url = upload(local, proxied)
    before = object_reads(proxied)
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda _: Source("red", url, cache=cache), range(4)))
    ranges = -(-4 * SIZE // 64)
    assert object_reads(proxied) - before == 4 + ranges  # dataset.json is read by each.
    [copy] = Path(cache.folder).glob("*/records.index")
    assert copy.read_bytes() == (Path(local) / "records.index").read_bytes()


def test_index_with_other_contents_is_refused(proxied, local, cache):
    """An index that does not fit dataset.json is an error at the start, and leaves no copy."""
    url = upload(local, proxied)
    data = bytearray((Path(local) / "records.index").read_bytes())
    data[5] ^= 1
    proxied.write(f"{url}/records.index", bytes(data))
    with pytest.raises(UserError, match=r"records.index of the data has other contents than dataset.json says"):
        Source("red", url, cache=cache)
    assert not list(Path(cache.folder).glob("*/records.index"))


def test_cached_records_need_no_request(proxied, local, expected, tmp_path):
    """With room for all records a second pass asks the bucket for nothing, in this process and in a new one."""
    cache = HostCache(str(tmp_path), 1 << 30)
    url = upload(local, proxied)
    source = Source("red", url, cache=cache)
    assert read_all(source) == expected
    before = object_reads(proxied)
    assert read_all(source) == expected
    assert read_all(pickle.loads(pickle.dumps(source))) == expected
    assert object_reads(proxied) == before


def test_cache_keeps_to_its_limit(proxied, local, expected, tmp_path):
    """A full cache drops nothing and adds nothing: later passes are served in part."""
    limit = sum(map(len, expected)) // 3
    source = Source("red", upload(local, proxied), cache=HostCache(str(tmp_path), limit))
    for _ in range(2):
        before = object_reads(proxied)
        assert read_all(source) == expected
    assert SIZE // 2 < object_reads(proxied) - before < SIZE
    kept = sum(file.stat().st_blocks * 512 for file in tmp_path.glob("*/*.bag"))
    assert kept < limit + SIZE * 2 * 4096  # Disks store whole pages.


def test_torn_record_of_the_cache_is_read_again(proxied, local, expected, tmp_path):
    """A record that a killed process has written in part is fetched again."""
    source = Source("red", upload(local, proxied), cache=HostCache(str(tmp_path), 1 << 30))
    assert read_all(source) == expected
    [first, *_] = sorted(tmp_path.glob("*/*.bag"))
    with first.open("r+b") as file:
        file.seek(10)
        file.write(bytes(100))
    before = object_reads(proxied)
    assert read_all(source) == expected
    assert object_reads(proxied) - before == 1


def _open_and_read(url, folder):
    source = Source("red", url, cache=HostCache(folder, 1 << 30))
    while True:
        for index in INDICES:
            source.read(index)


def test_cache_survives_kills(proxied, local, expected, tmp_path):
    """Readers killed at any moment, the copy of the index included, leave a cache that gives exact records."""
    url = upload(local, proxied)
    proxied.configure(delay_ms=3)
    context = multiprocessing.get_context("spawn")
    for delay_s in (0.0, 0.05, 0.2):
        process = context.Process(target=_open_and_read, args=(url, str(tmp_path)))
        process.start()
        deadline_s = time.monotonic() + 60
        while not list(tmp_path.glob("*/lock")) and time.monotonic() < deadline_s:
            time.sleep(0.01)
        time.sleep(delay_s)
        os.kill(process.pid, signal.SIGKILL)
        process.join()
    assert read_all(Source("red", url, cache=HostCache(str(tmp_path), 1 << 30))) == expected


def test_full_disk_is_told_at_the_start(proxied, local, tmp_path):
    """Without room for the index or for the wanted cache the run ends at the start, with the remedy."""
    url = upload(local, proxied)
    with files_of_at_most(10), pytest.raises(UserError, match=r"no room for the index of the data.*data.cache_dir"):
        Source("red", url, cache=HostCache(str(tmp_path)))
    with pytest.raises(UserError, match=r"data.cache_gb is more than the disk has room for: '1e\+06 GB, .*Lower it"):
        Source("red", url, cache=HostCache(str(tmp_path), 10**15))
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"cache folder cannot be made.*Set data.cache_dir"):
        Source("red", url, cache=HostCache(str(tmp_path / "file")))


def test_disk_that_becomes_full_stops_no_run(proxied, local, expected, tmp_path, capsys):
    """When a record cannot be kept, training goes on without the cache and says so once."""
    source = Source("red", upload(local, proxied), cache=HostCache(str(tmp_path), 1 << 30))
    with files_of_at_most(100):
        assert read_all(source) == expected
    assert capsys.readouterr().err.count("keeps no more records (File too large)") == 1


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (lambda server, url: server.delete(f"{url}/dataset.json"), "the folder has no dataset.json"),
        (lambda server, url: server.delete(f"{url}/00001.bag"), "1 of its files are missing: '00001.bag'"),
        (lambda server, url: server.write(f"{url}/00001.bag", b"short"), "a file has 5 bytes, and dataset.json says"),
        (lambda server, url: server.write(f"{url}/dataset.json", b'{"format_version": 3}'), "older .* Convert it"),
        (lambda server, url: server.configure(failures=1.0, kinds=["403"]), "the bucket refuses access.* Log in"),
        (lambda server, url: server.configure(failures=1.0, kinds=["401"]), "the bucket refuses access.* Log in"),
    ],
)
def test_bad_dataset_is_refused_at_the_start(proxied, local, cache, harm, message):
    """What is wrong with a dataset in a bucket is one sentence with its remedy when it is opened."""
    url = upload(local, proxied)
    harm(proxied, url)
    with pytest.raises(UserError, match=message):
        Source("red", url, cache=cache)


@pytest.mark.parametrize("url", ["gs://no-such-bucket/set", "{}/no/such/folder"])
def test_missing_bucket_or_folder(proxied, cache, url):
    """A bucket or a folder that is not there is one sentence."""
    url = url.format(f"gs://{proxied.bucket}")
    with pytest.raises(UserError, match="no such bucket"):
        Source("red", url, cache=cache)


def test_object_that_vanishes_or_shrinks_later(proxied, local, cache):
    """An object that vanishes or shrinks during the run ends it with the code of a user error."""
    url = upload(local, proxied)
    source = Source("red", url, patience_s=0.3, cache=cache)
    proxied.delete(f"{url}/00000.bag")
    with pytest.raises(UserError, match=r"an object of the data is gone .*00000.bag'. Restore it"):
        source.read(0)
    proxied.write(f"{url}/00000.bag", b"short")
    with pytest.raises(UserError, match=r"a file of the data is shorter than dataset.json says: '.*00000.bag'"):
        source.read(0)


def test_mixed_set_is_refused(proxied, local, cache):
    """A folder whose dataset.json lists shards of the old format is refused with the command that converts it."""
    url = upload(local, proxied)
    info = json.loads((Path(local) / "dataset.json").read_text())
    info["shards"][0]["file"] = "00000.arrayrecord"
    proxied.write(f"{url}/dataset.json", json.dumps(info).encode())
    with pytest.raises(UserError, match=r"1 of its shards are not .bag files.*prepare.convert gs://"):
        Source("red", url, cache=cache)


def test_schemes_without_support_are_refused(monkeypatch):
    """An unknown scheme, and one whose extra is not installed, are told before any request."""
    with pytest.raises(UserError, match=r"no such kind of storage: 'ftp://host/set'. Give a folder, gs://"):
        Source("red", "ftp://host/set")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"s3:// needs an extra.*pip install 'aimv2_jax\[s3\]'"):
        Source("red", "s3://bucket/set")
