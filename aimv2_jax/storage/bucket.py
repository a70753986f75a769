"""Objects in a bucket (gs://, s3://) or files of a local folder: ranged reads, whole reads, and sizes.

This is the only module that knows what TensorStore, fsspec and their transports raise. Every failure of a bucket
becomes an `OSError` with an errno, as a disk would raise it, so that all other modules treat buckets and disks alike:
EACCES (no right), ENOENT (no such object or bucket), ENODATA (an object is shorter), EEXIST (a precondition
failed), EINVAL (no such region, or a name that no bucket has), EAGAIN (may pass: busy, reset, timed out).

Libraries retry on their own before they raise, at most these times for one operation, each with growing pauses:
- TensorStore (ranged and whole reads): 1 attempt. `retries.retry` makes and counts all others.
- gcsfs (sizes, and all that etils does): 6 attempts, which no setting changes; 33 s until it raises.
- s3fs: 15 attempts (its own 5, of 3 by botocore each, which `FSSPEC_S3` in aimv2_jax/__init__.py sets); about 10 s.
Below them, curl and aiohttp repeat a request once whose connection was lost: twice as many requests at most.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import importlib.util
import logging
import os
import re
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

from aimv2_jax.errors import UserError, first_line

EXTRAS = {"gs": "gcs", "s3": "s3"}
"""Scheme of a URL -> the extra of this package that installs what reads it."""
_FILE_SYSTEMS = {"gs": "gcsfs", "s3": "s3fs"}
MAX_CONCURRENT_REQUESTS = 128
"""Ranged reads in flight per process; further ones wait."""
_READ_RETRIES = {"max_retries": 0}  # TensorStore makes none; `retries.retry` makes and counts them.

# Status that begins TensorStore's messages (absl::StatusCode).
_ERRNO_BY_STATUS = {
    "PERMISSION_DENIED": errno.EACCES,
    "UNAUTHENTICATED": errno.EACCES,
    "NOT_FOUND": errno.ENOENT,
    "OUT_OF_RANGE": errno.ENODATA,
    "FAILED_PRECONDITION": errno.EAGAIN,  # An answer that makes no sense; one of status 412 is no error of a read.
    "ABORTED": errno.EAGAIN,
    "UNAVAILABLE": errno.EAGAIN,
    "DEADLINE_EXCEEDED": errno.EAGAIN,
    "RESOURCE_EXHAUSTED": errno.EAGAIN,
    "INTERNAL": errno.EAGAIN,
    "UNKNOWN": errno.EAGAIN,
    "DATA_LOSS": errno.EAGAIN,
    "CANCELLED": errno.EAGAIN,
    "INVALID_ARGUMENT": errno.EINVAL,
}
# HTTP status of all other libraries; statuses that are absent may pass (EAGAIN).
_ERRNO_BY_HTTP = {
    301: errno.EINVAL,  # S3: the bucket lies in another region.
    400: errno.EINVAL,
    401: errno.EACCES,
    403: errno.EACCES,
    404: errno.ENOENT,
    412: errno.EEXIST,
    416: errno.ENODATA,
}
_LIBRARIES = {"gcsfs", "s3fs", "fsspec", "aiohttp", "aiobotocore", "botocore", "google", "requests", "urllib3"}
_CREDENTIAL_ERRORS = {"DefaultCredentialsError", "NoCredentialsError", "PartialCredentialsError", "RefreshError"}


def scheme_of(path: str | os.PathLike) -> str:
    """The scheme of a URL such as gs://BUCKET/FOLDER; "" for a local path."""
    return os.fspath(path).partition("://")[0] if "://" in os.fspath(path) else ""


def check_scheme(path: str | os.PathLike, what: str) -> None:
    """Raises `UserError` if `path`, named `what`, has a scheme that is unknown or whose extra is not installed."""
    scheme = scheme_of(path)
    if not scheme:
        return
    if scheme not in EXTRAS:
        raise UserError(f"{what}: no such kind of storage", os.fspath(path), "Give a folder, gs://... or s3://...")
    if not importlib.util.find_spec(_FILE_SYSTEMS[scheme]):
        remedy = f"Install it: pip install 'aimv2_jax[{EXTRAS[scheme]}]'"
        raise UserError(f"{what}: {scheme}:// needs an extra of this package", os.fspath(path), remedy)


@contextlib.contextmanager
def bucket_errors(path: str | os.PathLike) -> Iterator[None]:
    """Raises what a bucket's libraries raise inside as `OSError`; other errors stay, as do all of local paths."""
    try:
        yield
    except Exception as error:
        if not scheme_of(path) or (translated := as_os_error(error, os.fspath(path))) is error:
            raise
        raise translated from error


def as_os_error(error: Exception, path: str) -> Exception:
    """The `OSError` for what a bucket's library raised; `error` itself if it is none of theirs."""
    number = _errno_of(error)
    return error if number is None else OSError(number, _reason(error, number), path)


def _errno_of(error: Exception) -> int | None:
    """The errno that `error` becomes; None for one that is not a bucket's, such as a full disk or a bug."""
    status = re.match(r"[A-Z_]+(?=:)", str(error))
    if isinstance(error, ValueError) and status and status[0] in _ERRNO_BY_STATUS:
        return _ERRNO_BY_STATUS[status[0]]
    code = _http_status(error) or _http_status(error.__cause__)  # s3fs raises an OSError from botocore's error.
    if code is not None:
        return _ERRNO_BY_HTTP.get(code, errno.EAGAIN)
    if type(error).__name__ in _CREDENTIAL_ERRORS and not getattr(error, "retryable", False):
        return errno.EACCES
    if _library_of(error) in _LIBRARIES:
        return errno.EAGAIN
    if not isinstance(error, OSError):
        # gcsfs raises this for all statuses whose message has the word "invalid", such as 400.
        return errno.EINVAL if isinstance(error, ValueError) and str(error).startswith("Bad Request: ") else None
    if isinstance(error, ConnectionError | TimeoutError | socket.gaierror):
        return errno.EAGAIN
    if error.errno is not None:
        return None
    # gcsfs and s3fs raise these without a number: 404, 412, 403, and what their transports could not tell.
    if isinstance(error, FileNotFoundError):
        return errno.ENOENT
    if isinstance(error, FileExistsError):
        return errno.EEXIST
    if isinstance(error, PermissionError) or str(error).startswith("Forbidden"):
        return errno.EACCES
    return errno.EAGAIN


def _library_of(error: BaseException) -> str:
    return type(error).__module__.partition(".")[0]


def _http_status(error: BaseException | None) -> int | None:
    """HTTP status in an error of gcsfs or botocore."""
    response = getattr(error, "response", None)
    if _library_of(error) == "botocore" and isinstance(response, dict):
        return response.get("ResponseMetadata", {}).get("HTTPStatusCode")
    code = str(getattr(error, "code", None))
    return int(code) if _library_of(error) == "gcsfs" and code.isdecimal() else None


def _reason(error: Exception, number: int) -> str:
    what = {
        errno.EACCES: "the bucket refuses access",
        errno.ENOENT: "no such object or bucket",
        errno.ENODATA: "the object is shorter",
        errno.EEXIST: "a precondition of the request failed",
        errno.EAGAIN: "the bucket fails",
    }.get(number, os.strerror(number))
    return f"{what} ({first_line(error)[:200]})"


class ObjectFolder(Protocol):
    """A folder of named objects, local or in a bucket. Safe to use from several threads; pickles."""

    def read(self, name: str, start: int, stop: int) -> bytes:
        """Bytes start..stop of an object. Raises OSError; ENODATA if the object ends before `stop`."""

    def read_all(self, name: str) -> bytes:
        """A whole small object. Raises OSError."""

    def sizes(self) -> dict[str, int]:
        """Bytes of each object directly in the folder, by name; empty if there is no such folder. Raises OSError."""


def open_folder(path: str | os.PathLike) -> ObjectFolder:
    """The folder at a local path or URL; does no I/O."""
    return BucketFolder(os.fspath(path)) if scheme_of(path) else LocalFolder(Path(path))


class LocalFolder:
    """A folder on a disk. Each read opens its file anew, which takes 10 us, so that no descriptors are kept."""

    def __init__(self, path: Path):
        self._path = path

    def read(self, name: str, start: int, stop: int) -> bytes:
        path = os.path.join(self._path, name)
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            data = os.pread(descriptor, stop - start, start)
            while len(data) < stop - start:  # A read may be short (2 GiB limit, signals); only an empty one is the end.
                more = os.pread(descriptor, stop - start - len(data), start + len(data))
                if not more:
                    raise OSError(errno.ENODATA, "the file is shorter", path)
                data += more
        except OSError as error:
            error.filename = path
            raise
        finally:
            os.close(descriptor)
        return data

    def read_all(self, name: str) -> bytes:
        return (self._path / name).read_bytes()

    def sizes(self) -> dict[str, int]:
        try:
            with os.scandir(self._path) as entries:
                return {entry.name: entry.stat().st_size for entry in entries if entry.is_file()}
        except FileNotFoundError:
            return {}


class BucketFolder:
    """A folder in a bucket. TensorStore makes the reads, with a third to a half of the CPU time that gcsfs takes."""

    def __init__(self, url: str):
        self._url = url.rstrip("/")

    def read(self, name: str, start: int, stop: int) -> bytes:
        data = self._read(name, slice(start, stop))
        if len(data) != stop - start:
            raise OSError(errno.ENODATA, "the object is shorter", f"{self._url}/{name}")
        return data

    def read_all(self, name: str) -> bytes:
        return self._read(name, None)

    def sizes(self) -> dict[str, int]:
        with bucket_errors(self._url):
            system = file_system(self._url)
            folder = self._url.partition("://")[2]
            try:
                # `find` would omit the folders that it fails to list.
                entries = system.ls(folder, detail=True, refresh=True)
            except FileNotFoundError:
                system.ls(folder.partition("/")[0], refresh=True)  # Raises it if there is no bucket.
                entries = []
        files = (entry for entry in entries if entry["type"] == "file")
        found = {entry["name"].removeprefix(f"{folder}/"): int(entry["size"]) for entry in files}
        return {name: size for name, size in found.items() if name and "/" not in name}

    def _read(self, name: str, byte_range: slice | None) -> bytes:
        with bucket_errors(f"{self._url}/{name}"):
            result = _store(self._url).read(name, byte_range=byte_range).result()
        if result.state == "missing":
            raise OSError(errno.ENOENT, "no such object or bucket", f"{self._url}/{name}")
        if result.state != "value":
            raise OSError(errno.EEXIST, "a precondition of the request failed", f"{self._url}/{name}")
        return result.value


def look_up_credentials(path: str | os.PathLike) -> None:
    """Looks up the credentials again after a bucket has refused access.

    On a machine whose metadata server was not ready, as in a new pod, the libraries otherwise stay anonymous.
    """
    _store.cache_clear()
    _context.cache_clear()
    if scheme_of(path) == "gs":
        with contextlib.suppress(Exception):  # The next request fails again, with its own reason.
            file_system(path).credentials.connect()


def file_system(path: str | os.PathLike) -> Any:
    """fsspec's file system of a URL. It caches no listings, since TensorStore and other hosts write to buckets, too."""
    return _file_system(scheme_of(path))


@functools.cache
def _file_system(scheme: str) -> Any:
    import fsspec

    logging.getLogger("gcsfs").setLevel(logging.CRITICAL)  # It logs tracebacks of what it also raises.
    return fsspec.filesystem(scheme, use_listings_cache=False)


@functools.cache
def _context() -> Any:
    import tensorstore

    limit = {"limit": MAX_CONCURRENT_REQUESTS}
    return tensorstore.Context(
        {
            "gcs_request_concurrency": limit,
            "s3_request_concurrency": limit,
            "gcs_request_retries": _READ_RETRIES,
            "s3_request_retries": _READ_RETRIES,
        }
    )


@functools.cache
def _store(url: str) -> Any:
    import tensorstore

    scheme, _, rest = url.partition("://")
    bucket, _, folder = rest.partition("/")
    spec = {"driver": {"gs": "gcs"}.get(scheme, scheme), "bucket": bucket, "path": f"{folder}/" if folder else ""}
    if scheme == "s3" and (endpoint := os.environ.get("AWS_ENDPOINT_URL")):
        spec |= {"endpoint": endpoint, "aws_region": os.environ.get("AWS_DEFAULT_REGION", "us-east-1")}
    return tensorstore.KvStore.open(spec, context=_context()).result()
