"""The connections between the watchers of a run's processes: JSON, a line a message. Needs no jax."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Mapping
from typing import Any

from aimv2_jax.untrusted import parse_json_object

_MAX_BYTES = 1 << 20  # Of a message: a stranger that sends more is none of ours.

Message = Mapping[str, Any]


class Link:
    """A connection to another watcher that never waits."""

    def __init__(self, connection: socket.socket):
        self._socket = connection
        self._socket.setblocking(False)
        self._received, self._unsent = b"", b""
        self.closed = False  # By the other side, or broken.
        self.heard_s = time.monotonic()  # When anything came last.

    def fileno(self) -> int:
        return self._socket.fileno()

    def send(self, message: Message) -> None:
        """Sends as soon as the connection takes it; nothing once it is closed."""
        self._unsent += json.dumps(message).encode() + b"\n"
        self.flush()

    def flush(self) -> None:
        """Sends what could not be sent before."""
        while self._unsent and not self.closed:
            try:
                self._unsent = self._unsent[self._socket.send(self._unsent) :]
            except BlockingIOError:
                return
            except OSError:
                self.closed = True

    def receive(self) -> list[Message]:
        """The messages that have come."""
        while not self.closed and len(self._received) <= _MAX_BYTES:
            try:
                data = self._socket.recv(1 << 16)
            except BlockingIOError:
                break
            except OSError:
                data = b""
            self.closed = not data
            self._received += data
            self.heard_s = time.monotonic()
        *lines, self._received = self._received.split(b"\n")
        if len(self._received) > _MAX_BYTES:
            self.closed = True
        try:
            return [parse_json_object(line) for line in lines]
        except ValueError:
            self.closed = True  # Not one of ours.
            return []

    def close(self) -> None:
        self.closed = True
        self._socket.close()
