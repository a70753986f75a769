"""Lease files for file systems without locks: a run renews its lease while it uses a folder.

Another run that finds the lease watches whether it changes. So clocks are never compared, and the lease of a killed run
is taken over after a timeout. A run whose lease was taken over (it was suspended for longer) exits at once, since two
runs must not write to one folder.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import socket
import sys
import threading
import time
from pathlib import Path

from aimv2_jax.console import print_line
from aimv2_jax.errors import EXIT_USER, UserError
from aimv2_jax.untrusted import parse_json_object, printable, read_file

_RENEW_INTERVAL_S = 5.0
_EXPIRES_AFTER_S = 60.0  # Time without a change. NFS caches file attributes for up to 60 s.
_NUM_BYTES = 512  # Fixed size, so that the file can be rewritten on a full disk.


class Lease(contextlib.AbstractContextManager):
    """Context manager that holds the lease `file` of `folder`; `what` is the flag that named the folder.

    Raises:
      UserError: when another run renews the lease, so the folder is in use.
    """

    def __init__(self, file: Path, what: str, folder: Path | str):
        self._file = file
        self._what = what
        self._folder = folder
        self._token = secrets.token_hex(16)
        self._count = 0
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._renew, name="lease", daemon=True)

    def __enter__(self) -> Lease:
        found = self._read()
        if found is None:
            try:
                with self._file.open("xb"):
                    pass
            except FileExistsError as error:
                raise self._in_use(self._read()) from error
        else:
            self._watch(found)
        self._write()
        time.sleep(_RENEW_INTERVAL_S / 5)
        self._check(self._read())  # Another run may have started at the same time; the last writer holds the lease.
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._ended.set()
        self._thread.join()
        with contextlib.suppress(OSError):
            if self._is_mine(self._read()):
                self._file.unlink()

    def _watch(self, found: bytes) -> None:
        """Waits until the lease has expired or is deleted; raises `UserError` when it changes."""
        print_line(
            f"{self._folder} was in use by {_owner(found)}: "
            f"waiting up to {_EXPIRES_AFTER_S:.0f} s for it to renew its lease",
            sys.stderr,
        )
        end_s = time.monotonic() + _EXPIRES_AFTER_S
        while time.monotonic() < end_s:
            time.sleep(_RENEW_INTERVAL_S / 5)
            current = self._read()
            if current is None:  # The other run has ended normally.
                return
            if current != found:
                raise self._in_use(current)

    def _renew(self) -> None:
        while not self._ended.wait(_RENEW_INTERVAL_S):
            with contextlib.suppress(OSError, UserError):  # A disk may fail temporarily; the next renewal may succeed.
                current = self._read()
                if current is not None and not self._is_mine(current):
                    print_line(f"error: {self._in_use(current)}", sys.stderr)
                    os._exit(EXIT_USER)
                self._write()

    def _check(self, data: bytes | None) -> None:
        if not self._is_mine(data):
            raise self._in_use(data)

    def _is_mine(self, data: bytes | None) -> bool:
        return data is not None and self._token.encode() in data

    def _in_use(self, data: bytes | None) -> UserError:
        return UserError(
            f"{self._what} is in use by another run",
            f"{self._folder}, by {_owner(data or b'')}",
            "Wait until it has ended, or give another folder",
        )

    def _read(self) -> bytes | None:
        try:
            return read_file(self._file, _NUM_BYTES)
        except FileNotFoundError:
            return None
        except ValueError as error:
            raise UserError(f"{self._file.name} is not the lease of a run", str(self._file), "Remove it") from error

    def _write(self) -> None:
        self._count += 1
        owner = {"host": socket.gethostname(), "process": os.getpid(), "token": self._token, "count": self._count}
        flags = os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
        with open(os.open(self._file, flags, 0o666), "wb", buffering=0) as file:
            file.write(json.dumps(owner).encode().ljust(_NUM_BYTES - 1) + b"\n")


def _owner(data: bytes) -> str:
    try:
        owner = parse_json_object(data)
        return printable(f"process {owner['process']} on {owner['host']}")
    except (ValueError, KeyError):
        return "another run"
