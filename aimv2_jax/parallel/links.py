"""The roll call of a run's processes at its start, and the connections between their watchers that stay afterwards.

Process 0 listens at the coordinator's address until all have come; then jax listens there. What goes over a connection
is JSON, a line a message. Needs no jax.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import selectors
import socket
import time
from collections.abc import Iterable, Mapping
from typing import Any

from aimv2_jax.errors import UserError
from aimv2_jax.parallel.clusters import Place

_RETRY_S = 0.2  # Between two tries to reach process 0.
_ANSWER_S = 5.0  # That process 0 may need to answer after the time-out, and that a new connection has to say who it is.
_MAX_BYTES = 1 << 20  # Of a message: a stranger that sends more is none of ours.
_SHOWN = 20  # Processes that a line names.

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
            messages = [json.loads(line) for line in lines]
        except ValueError:
            messages = None
        if messages is None or not all(isinstance(message, dict) for message in messages):
            self.closed = True  # Not one of ours.
            return []
        return messages

    def close(self) -> None:
        self.closed = True
        self._socket.close()


@dataclasses.dataclass(frozen=True)
class Team:
    """All processes: their hosts, and the links of this one: to all others from process 0, from them to process 0."""

    hosts: Mapping[int, str]
    links: Mapping[int, Link]


def call_roll(place: Place, host: str, command: str, timeout_s: float) -> Team:
    """Waits until all processes of the run have come.

    Args:
      host: this one's.
      command: what all must have been started with alike.

    Raises:
      UserError: on every process that came, naming those that are there and those that are missing after `timeout_s`;
        or who was started differently, or twice.
    """
    me = {"index": place.index, "host": host, "count": place.count, "command": command}
    return _gather(place, me, timeout_s) if place.index == 0 else _report(place, me, timeout_s)


def _gather(place: Place, me: Message, timeout_s: float) -> Team:
    """Process 0's part."""
    deadline_s = time.monotonic() + timeout_s
    came: dict[int, tuple[str, Link | None]] = {0: (me["host"], None)}
    unknown: list[Link] = []
    with _listener(place) as listener, selectors.DefaultSelector() as selector:
        selector.register(listener, selectors.EVENT_READ)
        while len(came) < place.count:
            if time.monotonic() > deadline_s:
                _refuse(came, unknown, _absent(place, {index: name for index, (name, _) in came.items()}, timeout_s))
            for key, _ in selector.select(0.1):
                if key.fileobj is listener:
                    unknown.append(Link(listener.accept()[0]))
                    selector.register(unknown[-1], selectors.EVENT_READ)
            for link in list(unknown):
                messages = link.receive()
                ours = bool(messages) and messages[0].keys() == me.keys()
                if ours:
                    reason = _mismatch(messages[0], me, came)
                    if reason is not None:
                        _refuse(came, unknown, reason)
                    came[messages[0]["index"]] = messages[0]["host"], link
                if messages or link.closed or time.monotonic() > link.heard_s + _ANSWER_S:
                    unknown.remove(link)
                    selector.unregister(link)
                    if not ours:  # A stranger, or one that has died since.
                        link.close()
            for index, (_, link) in list(came.items()):
                if link is not None and _gone(link):
                    del came[index]
                    link.close()
    for link in unknown:
        link.close()
    hosts = {index: name for index, (name, _) in sorted(came.items())}
    links = {index: link for index, (_, link) in came.items() if link is not None}
    for link in links.values():
        link.send({"hosts": hosts})
    return Team(hosts, links)


def _gone(link: Link) -> bool:
    """Whether one that had come has died since."""
    link.receive()
    return link.closed


def _listener(place: Place) -> socket.socket:
    host, _, port = place.bind_address.rpartition(":")
    every = host == "[::]"
    try:
        if every and not socket.has_dualstack_ipv6():
            return socket.create_server(("", int(port)), backlog=place.count)
        family = socket.AF_INET6 if every else socket.AF_INET
        name = "::" if every else host
        return socket.create_server((name, int(port)), family=family, backlog=place.count, dualstack_ipv6=every)
    except OSError as error:
        remedy = "Give a free port of that host, the same on all processes, and --process 0 to one of them only"
        raise UserError(f"--coordinator cannot be listened on ({error.strerror})", place.coordinator, remedy) from error


def _mismatch(message: Message, me: Message, came: Mapping[int, tuple[str, Any]]) -> UserError | None:
    """What is wrong with one that has come, or None."""
    index, host = message.get("index"), message.get("host")
    who = f"process {index} on {host}"
    if message.get("count") != me["count"]:
        remedy = "Start all processes with the same command"
        return UserError(
            f"{who} has another number of processes than process 0's {me['count']}", message["count"], remedy
        )
    if message.get("command") != me["command"]:
        remedy = "Start the same version with the same config and workdir on all hosts"
        return UserError(f"{who} was started otherwise than process 0 on {me['host']}", message.get("command"), remedy)
    if index in came:
        return UserError(f"two processes have --process {index}", f"{came[index][0]} and {host}", "Give each its own")
    return None


def _absent(place: Place, there: Mapping[int, str], timeout_s: float) -> UserError:
    """That some are missing, and who."""
    missing = {index: place.hosts.get(index, "host unknown") for index in range(place.count) if index not in there}
    what = (
        f"only {len(there)} of {place.count} processes have come within {timeout_s:g} s (processes.startup_timeout_s); "
        f"there are {_listed(there)}; missing"
    )
    return UserError(what, _listed(missing), "Start the same command on the missing hosts, too, or look after them")


def _listed(hosts: Mapping[int, str]) -> str:
    named = [f"{index} ({name})" for index, name in sorted(hosts.items())]
    more = f", and {len(named) - _SHOWN} more" if len(named) > _SHOWN else ""
    return ", ".join(named[:_SHOWN]) + more


def _refuse(came: Mapping[int, tuple[str, Link | None]], others: Iterable[Link], error: UserError) -> None:
    """Tells all that have come why the run does not start, and raises it here."""
    words = [error.what, str(error.value), error.remedy]
    for link in [*others, *(link for _, link in came.values() if link is not None)]:
        link.send({"refused": words})
        link.close()
    raise error


def _report(place: Place, me: Message, timeout_s: float) -> Team:
    """The part of all but process 0."""
    deadline_s = time.monotonic() + timeout_s
    link = None
    while time.monotonic() < deadline_s:
        if link is None:
            with contextlib.suppress(OSError):
                link = Link(socket.create_connection(place.address, timeout=5 * _RETRY_S))
                link.send(me)
                deadline_s = time.monotonic() + timeout_s + _ANSWER_S  # Process 0 is there: its time-out tells more.
            if link is None:
                time.sleep(_RETRY_S)
                continue
        with selectors.DefaultSelector() as selector:
            selector.register(link, selectors.EVENT_READ)
            selector.select(_RETRY_S)
        for message in link.receive():
            if "refused" in message:
                link.close()
                raise UserError(*message["refused"])
            if "hosts" in message:
                return Team({int(index): name for index, name in message["hosts"].items()}, {0: link})
        if link.closed:  # Process 0 has died, or is none of ours: it may be started again.
            link.close()
            link = None
            time.sleep(_RETRY_S)
    if link is not None:
        link.close()
    host = place.hosts.get(0, place.address[0])
    remedy = "Start the same command on process 0's host, too, and see that the hosts reach that port of it"
    what = f"process 0 on {host} has not been reached within {timeout_s:g} s (processes.startup_timeout_s) at"
    raise UserError(what, place.coordinator, remedy)
