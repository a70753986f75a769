"""A file that a run renews while it is at work in a folder, where the file system has no locks.

Another run that finds the file watches whether it changes. So no two clocks are compared, and what a killed run left
is taken over after some waiting. A run whose lease was taken over (it was suspended for longer) ends at once: it must
not write beside the other.
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

_RENEWED_EVERY_S = 5.0
_GIVEN_UP_AFTER_S = 60.0  # Without a change. File systems such as NFS keep what they know of a file that long.
_BYTES = 512  # Of the file, always: a full disk can still rewrite it.


class Lease(contextlib.AbstractContextManager):
    """Holds the lease `file` of `folder`; `what` is the flag that named the folder.

    Raises:
      UserError: that the folder is in use, if another run renews the lease.
    """

    def __init__(self, file: Path, what: str, folder: Path | str):
        self._file, self._what, self._folder = file, what, folder
        self._token, self._count = secrets.token_hex(16), 0
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._renew, name="lease", daemon=True)

    def __enter__(self) -> Lease:
        before = self._read()
        if before is None:
            try:
                with self._file.open("xb"):
                    pass
            except FileExistsError as error:
                raise self._in_use(self._read()) from error
        else:
            self._watch(before)
        self._write()
        time.sleep(_RENEWED_EVERY_S / 5)
        self._check(self._read())  # Another may have begun at the same time; the last to write has it.
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._ended.set()
        self._thread.join()
        with contextlib.suppress(OSError):
            if self._is_mine(self._read()):
                self._file.unlink()

    def _watch(self, before: bytes) -> None:
        """Returns when the lease has not changed for long enough, or is gone; raises `UserError` when it changes."""
        print_line(
            f"{self._folder} was in use by {_owner(before)}: waiting up to {_GIVEN_UP_AFTER_S:.0f} s for a sign of it",
            sys.stderr,
        )
        end_s = time.monotonic() + _GIVEN_UP_AFTER_S
        while time.monotonic() < end_s:
            time.sleep(_RENEWED_EVERY_S / 5)
            now = self._read()
            if now is None:  # That run has ended in good order.
                return
            if now != before:
                raise self._in_use(now)

    def _renew(self) -> None:
        while not self._ended.wait(_RENEWED_EVERY_S):
            with contextlib.suppress(OSError, UserError):  # A disk may refuse for a while; the next look may succeed.
                now = self._read()
                if now is not None and not self._is_mine(now):
                    print_line(f"error: {self._in_use(now)}", sys.stderr)
                    os._exit(EXIT_USER)
                self._write()

    def _check(self, now: bytes | None) -> None:
        if not self._is_mine(now):
            raise self._in_use(now)

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
            return read_file(self._file, _BYTES)
        except FileNotFoundError:
            return None
        except ValueError as error:
            raise UserError(f"{self._file.name} is not the lease of a run", str(self._file), "Remove it") from error

    def _write(self) -> None:
        self._count += 1
        about = {"host": socket.gethostname(), "process": os.getpid(), "token": self._token, "count": self._count}
        flags = os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
        with open(os.open(self._file, flags, 0o666), "wb", buffering=0) as file:
            file.write(json.dumps(about).encode().ljust(_BYTES - 1) + b"\n")


def _owner(data: bytes) -> str:
    try:
        about = parse_json_object(data)
        return printable(f"process {about['process']} on {about['host']}")
    except (ValueError, KeyError):
        return "another run"
