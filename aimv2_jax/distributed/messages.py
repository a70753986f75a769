"""Connections between the supervisors of a run's processes: one JSON message per line. Needs no jax."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Mapping
from typing import Any

from aimv2_jax.untrusted import parse_json_object

_MAX_MESSAGE_BYTES = 1 << 20  # Larger messages are rejected: they are not of this protocol.

Message = Mapping[str, Any]


class Connection:
    """Non-blocking connection to another supervisor."""

    def __init__(self, connection: socket.socket):
        self._socket = connection
        self._socket.setblocking(False)
        self._received = b""
        self._unsent = b""
        self.closed = False  # True once this or the other side has closed it, or it broke.
        self.heard_s = time.monotonic()  # Time at which the last data arrived.

    def fileno(self) -> int:
        return self._socket.fileno()

    def send(self, message: Message) -> None:
        """Queues a message and sends what the connection accepts now; does nothing once it is closed."""
        self._unsent += json.dumps(message).encode() + b"\n"
        self.flush()

    def flush(self) -> None:
        """Sends queued data."""
        while self._unsent and not self.closed:
            try:
                self._unsent = self._unsent[self._socket.send(self._unsent) :]
            except BlockingIOError:
                return
            except OSError:
                self.closed = True

    def receive(self) -> list[Message]:
        """Returns the messages that have arrived."""
        while not self.closed and len(self._received) <= _MAX_MESSAGE_BYTES:
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
        if len(self._received) > _MAX_MESSAGE_BYTES:
            self.closed = True
        try:
            return [parse_json_object(line) for line in lines]
        except ValueError:
            self.closed = True  # The message is not of this protocol.
            return []

    def close(self) -> None:
        self.closed = True
        self._socket.close()
