"""Errors and requests of the real client libraries, against servers behind the failing proxy."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import importlib.util
import os
import socket
import subprocess
import sys

import google.auth.exceptions
import pytest
from etils import epath

from aimv2_jax.errors import UserError
from aimv2_jax.storage import bucket
from aimv2_jax.storage.bucket import as_os_error, bucket_errors, check_scheme, open_folder
from tests.helpers.buckets import BucketServer, clients_of, proxy

DATA = bytes(range(200))
ERRNO_BY_KIND = {
    "401": errno.EACCES,
    "403": errno.EACCES,
    "429": errno.EAGAIN,
    "500": errno.EAGAIN,
    "503": errno.EAGAIN,
    "reset": errno.EAGAIN,
    "cut": errno.EAGAIN,
    "short": errno.EAGAIN,
}
READS = {
    "read": lambda url: open_folder(url).read("a.bin", 10, 30),
    "read_all": lambda url: open_folder(url).read_all("a.bin"),
}
OTHERS = {
    "sizes": lambda url: open_folder(url).sizes(),
    "epath_read": lambda url: (epath.Path(url) / "a.bin").read_bytes(),
    "epath_write": lambda url: (epath.Path(url) / "b.txt").write_text("b"),
    "epath_exists": lambda url: (epath.Path(url) / "a.bin").exists(),
    "epath_iterdir": lambda url: list(epath.Path(url).iterdir()),
    "epath_stat": lambda url: (epath.Path(url) / "a.bin").stat(),
    "epath_unlink": lambda url: (epath.Path(url) / "a.bin").unlink(),
}
MAX_REQUESTS = {"gs": 6, "s3": 15}
"""Of one kind, that gcsfs or s3fs makes for one operation that fails, as storage/bucket.py documents them."""
MAX_READ_REQUESTS = 1


@pytest.fixture(scope="module", params=["fake_gcs", "moto_s3"])
def proxied(request):
    """A proxy before fake-gcs-server and before moto."""
    with proxy(request.getfixturevalue(request.param)) as proxied:
        yield proxied


@pytest.fixture
def url(proxied):
    """A folder with the object a.bin; requests go through the proxy and do not fail yet."""
    with clients_of(proxied):
        yield new_folder(proxied)
        proxied.configure()


@pytest.fixture(params=["fake_gcs", "gcs_emulator", "moto_s3"])
def direct(request):
    """A folder with the object a.bin on each of the servers, without the proxy."""
    server = request.getfixturevalue(request.param)
    with clients_of(server):
        yield server, new_folder(server)


@pytest.fixture
def no_pauses(monkeypatch):
    """Lets gcsfs, s3fs and botocore retry at once; their pauses add up to half a minute."""
    sleep = asyncio.sleep
    monkeypatch.setattr(asyncio, "sleep", lambda *_: sleep(0))


def new_folder(server: BucketServer) -> str:
    url = server.new_folder()
    server.write(f"{url}/a.bin", DATA)
    return url


def errno_of(operation, url: str) -> int | None:
    """The errno with which an operation fails; None if it succeeds."""
    try:
        with bucket_errors(url):
            operation(url)
    except OSError as error:
        return error.errno
    return None


def requests_of(proxied, call) -> dict[str, int]:
    """Requests that a call makes, by method and operation, whether it fails or not."""
    before = proxied.counts()["requests"]
    with contextlib.suppress(OSError):
        call()
    after = proxied.counts()["requests"]
    return {name: count - before.get(name, 0) for name, count in after.items() if count > before.get(name, 0)}


@pytest.mark.parametrize("kind", ERRNO_BY_KIND)
def test_errno_of_each_failure(kind, url, proxied, no_pauses):
    """Every operation of a client fails with the errno that is documented, after a bounded number of requests."""
    found, requests = {}, {}
    for name, operation in {**READS, **OTHERS}.items():
        proxied.configure(failures=1.0, kinds=[kind])
        requests[name] = requests_of(proxied, lambda: found.update({name: errno_of(operation, url)}))  # noqa: B023
    assert found == dict.fromkeys({**READS, **OTHERS}, ERRNO_BY_KIND[kind])
    repeated = 1 if kind.isdecimal() else 2  # curl and aiohttp repeat a request whose connection was lost.
    for name, counts in requests.items():
        limit = MAX_READ_REQUESTS if name in READS else MAX_REQUESTS[proxied.scheme]
        assert counts and max(counts.values()) <= limit * repeated, name


def test_requests_of_a_call_that_succeeds(url, proxied):
    """A read is one request, and so are the sizes of a folder."""
    folder = open_folder(url)
    assert requests_of(proxied, lambda: folder.read("a.bin", 10, 30)) == {"GET read": 1}
    assert requests_of(proxied, lambda: folder.read_all("a.bin")) == {"GET read": 1}
    assert requests_of(proxied, folder.sizes) == {"GET list": 1}


def test_requests_of_a_call_that_fails(url, proxied, no_pauses):
    """The documented numbers of attempts: TensorStore 1, gcsfs 6, s3fs 5 of 3 requests."""
    proxied.configure(failures=1.0, kinds=["503"])
    folder = open_folder(url)
    assert requests_of(proxied, lambda: folder.read("a.bin", 10, 30)) == {"GET read": 1}
    assert requests_of(proxied, folder.sizes) == {"GET list": {"gs": 6, "s3": 15}[proxied.scheme]}


@pytest.mark.parametrize("kind", ["429", "503", "reset", "cut", "short", "slow"])
def test_failure_that_passes_is_hidden(kind, url, proxied, no_pauses):
    """One failure of gcsfs or s3fs is repaired by the library itself. Our reads leave all retries to us."""
    for name, operation in OTHERS.items():
        proxied.configure(failures=1.0, limit=1, kinds=[kind], slow_ms=20)
        # A deletion that was done, but whose answer was lost, is repeated and finds nothing.
        done_before = name == "epath_unlink" and kind in ("reset", "cut", "short")
        assert errno_of(operation, url) in ({None, errno.ENOENT} if done_before else {None}), name
    assert proxied.counts()["failures"][kind] >= len(OTHERS)


def test_object_that_vanished(url, proxied):
    """Its reads fail with ENOENT, though the folder lists it."""
    proxied.configure(failures=1.0, kinds=["404"])
    assert {name: errno_of(operation, url) for name, operation in READS.items()} == dict.fromkeys(READS, errno.ENOENT)
    assert errno_of(OTHERS["epath_read"], url) == errno.ENOENT
    assert open_folder(url).sizes() == {"a.bin": len(DATA)}


def test_precondition_that_fails(url, proxied):
    """A write that must create its object fails with EEXIST; other requests never do."""
    system = bucket._file_system(proxied.scheme)
    proxied.configure(failures=1.0, kinds=["412"])
    assert errno_of(lambda url: system.pipe(f"{url}/new", b"x", mode="create"), url) == errno.EEXIST
    assert errno_of(OTHERS["epath_write"], url) is None
    assert errno_of(READS["read"], url) is None


def test_reads_and_sizes_of_a_folder(direct):
    """Sizes are of the objects directly in the folder, not of folders in it or of longer names beside it."""
    server, url = direct
    server.write(f"{url}/inner/c.bin", b"c")
    server.write(f"{url}-longer/d.bin", b"d")
    folder = open_folder(url)
    assert folder.sizes() == {"a.bin": len(DATA)}
    assert (folder.read("a.bin", 10, 30), folder.read_all("a.bin")) == (DATA[10:30], DATA)
    assert open_folder(f"{url}/").sizes() == {"a.bin": len(DATA)}
    assert open_folder(f"{url}/a.bin").sizes() == open_folder(f"{url}/absent").sizes() == {}


def test_object_or_bucket_is_missing(direct):
    server, url = direct
    missing = f"{server.scheme}://{server.bucket}-missing/folder"
    folders = [open_folder(f"{url}/absent"), open_folder(missing)]
    assert {errno_of(lambda _: folder.read("a.bin", 0, 1), url) for folder in folders} == {errno.ENOENT}  # noqa: B023
    assert {errno_of(lambda _: folder.read_all("a.bin"), url) for folder in folders} == {errno.ENOENT}  # noqa: B023
    assert errno_of(OTHERS["sizes"], missing) == errno.ENOENT
    assert errno_of(OTHERS["epath_read"], missing) == errno.ENOENT


def test_object_is_shorter_than_asked(direct):
    """A range that ends behind the object's end is ENODATA."""
    _, url = direct
    assert errno_of(lambda url: open_folder(url).read("a.bin", 100, len(DATA) + 1), url) == errno.ENODATA


@pytest.mark.parametrize(("start", "stop"), [(len(DATA), len(DATA) + 9), (900, 901)])
def test_object_ends_before_what_is_asked(start, stop, url):
    """A range that begins behind the object's end is ENODATA; gcp-storage-emulator does not answer it with 416."""
    assert errno_of(lambda url: open_folder(url).read("a.bin", start, stop), url) == errno.ENODATA


def test_object_of_another_client_is_seen(direct):
    """Neither library caches listings: what another host wrote or deleted is seen at once."""
    server, url = direct
    path = epath.Path(url)
    assert [entry.name for entry in path.iterdir()] == ["a.bin"]
    server.write(f"{url}/b.bin", b"b")
    assert (path / "b.bin").exists() and open_folder(url).sizes() == {"a.bin": len(DATA), "b.bin": 1}
    server.delete(f"{url}/b.bin")
    assert not (path / "b.bin").exists() and open_folder(url).sizes() == {"a.bin": len(DATA)}


def test_server_that_is_gone(direct, no_pauses):
    server, url = direct
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))  # Bound, so that nobody else listens there.
        gone = BucketServer(server.scheme, f"127.0.0.1:{unused.getsockname()[1]}", server.bucket)
        with clients_of(gone):
            found = {name: errno_of(operation, url) for name, operation in {**READS, **OTHERS}.items()}
    assert found == dict.fromkeys({**READS, **OTHERS}, errno.EAGAIN)


def test_credentials_are_missing(moto_s3, monkeypatch):
    """botocore finds none; GCS answers requests without credentials with 401, which is tested above."""
    with clients_of(moto_s3):
        monkeypatch.delenv("AWS_ACCESS_KEY_ID")
        monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
        assert errno_of(OTHERS["sizes"], moto_s3.new_folder()) == errno.EACCES


@pytest.mark.parametrize(
    ("error", "number"),
    [
        (google.auth.exceptions.DefaultCredentialsError("no credentials"), errno.EACCES),
        (google.auth.exceptions.RefreshError("expired"), errno.EACCES),
        (google.auth.exceptions.RefreshError("busy", retryable=True), errno.EAGAIN),
        (google.auth.exceptions.TransportError("no connection"), errno.EAGAIN),
        (socket.gaierror(socket.EAI_AGAIN, "Temporary failure in name resolution"), errno.EAGAIN),
        (ConnectionResetError(errno.ECONNRESET, "reset"), errno.EAGAIN),
        (TimeoutError(), errno.EAGAIN),
        (ValueError("Bad Request: b/x\ninvalid bucket name"), errno.EINVAL),
        (ValueError("INVALID_ARGUMENT: Invalid GCS bucket name"), errno.EINVAL),
    ],
    ids=lambda value: type(value).__name__,
)
def test_errno_of_an_error(error, number):
    """Errors that no local server causes."""
    translated = as_os_error(error, "gs://bucket/folder")
    assert translated.errno == number and translated.filename == "gs://bucket/folder"


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "full"), ValueError("Bad record"), KeyError("x"), TypeError()])
def test_error_of_no_bucket_stays(error):
    """A full disk, bad data and bugs are not the bucket's."""
    assert as_os_error(error, "gs://bucket/folder") is error


def test_error_of_a_local_path_stays(tmp_path):
    error = TimeoutError()
    with pytest.raises(TimeoutError) as caught, bucket_errors(tmp_path):
        raise error
    assert caught.value is error


def test_scheme_is_unknown_or_needs_an_extra(monkeypatch):
    """Both are named, with the remedy; folders and installed schemes pass."""
    for path in ("/some/folder", "package:data", "gs://bucket/set", "s3://bucket/set"):
        check_scheme(path, "data.sources")
    with pytest.raises(UserError, match=r"data\.sources.*'?az://bucket.*gs://... or s3://..."):
        check_scheme("az://bucket", "data.sources")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    for scheme, extra in {"gs": "gcs", "s3": "s3"}.items():
        with pytest.raises(UserError, match=rf"{scheme}://bucket.*pip install 'aimv2_jax\[{extra}\]'"):
            check_scheme(f"{scheme}://bucket", "data.sources")


def test_local_folder_reads_and_fails_alike(tmp_path):
    """A folder on a disk has the same data, sizes and errnos."""
    (tmp_path / "a.bin").write_bytes(DATA)
    (tmp_path / "inner").mkdir()
    folder, absent = open_folder(tmp_path), open_folder(tmp_path / "absent")
    assert (folder.read("a.bin", 10, 30), folder.read_all("a.bin")) == (DATA[10:30], DATA)
    assert (folder.sizes(), absent.sizes()) == ({"a.bin": len(DATA)}, {})
    for start in (100, len(DATA), 900):
        with pytest.raises(OSError) as caught:
            folder.read("a.bin", start, len(DATA) + 1 + start)
        assert (caught.value.errno, caught.value.filename) == (errno.ENODATA, str(tmp_path / "a.bin"))
    for call in (lambda: folder.read("b.bin", 0, 1), lambda: folder.read_all("b.bin"), lambda: absent.read("a", 0, 1)):
        with pytest.raises(FileNotFoundError):
            call()


@pytest.mark.parametrize(("value", "backend"), [(None, "_FileSystemSpecBackend"), ("true", "_TfBackend")])
def test_etils_reaches_buckets_by_fsspec(value, backend):
    """Not by TensorFlow, though that is installed, unless the user chooses it."""
    assert importlib.util.find_spec("tensorflow")
    environment = {name: text for name, text in os.environ.items() if name != "EPATH_USE_TF"}
    environment |= {"EPATH_USE_TF": value} if value else {}
    code = "import aimv2_jax; from etils import epath; print(type(epath.Path('gs://b/x')._backend).__name__)"
    output = subprocess.check_output([sys.executable, "-c", code], env=environment, text=True)
    assert output.strip() == backend
