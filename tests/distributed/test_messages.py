"""Connections between supervisors: messages arrive complete and in order; invalid data closes the connection."""

from __future__ import annotations

import contextlib
import socket
import time

import pytest

from aimv2_jax.distributed.messages import Connection


def test_link_when_much_is_sent_at_once_then_all_of_it_comes_in_order():
    one, other = map(Connection, socket.socketpair())
    sent = [{"number": number, "text": "x" * 5000} for number in range(200)]
    for message in sent:
        one.send(message)
    came = []
    deadline_s = time.monotonic() + 10
    while len(came) < len(sent):
        came += other.receive()
        one.flush()
        assert time.monotonic() < deadline_s
    assert came == sent
    one.close()
    assert other.receive() == [] and other.closed
    other.close()


@pytest.mark.parametrize(
    "sent", [b"[" * 200_000, b"GET / HTTP/1.1\r", b"\xff", b"[1]", b"NaN", b"1" * 10_000, b'{"index": 1'], ids=range(7)
)
def test_link_when_garbage_comes(sent):
    one, other = socket.socketpair()
    connection = Connection(other)
    one.sendall(sent + b"\n")
    assert connection.receive() == [] and connection.closed
    one.close(), connection.close()


def test_link_when_a_message_has_no_end():
    one, other = socket.socketpair()
    connection = Connection(other)
    one.setblocking(False)
    for _ in range(100):
        with contextlib.suppress(BlockingIOError):
            one.send(b"x" * (1 << 16))
        connection.receive()
    assert connection.closed
    one.close(), connection.close()
