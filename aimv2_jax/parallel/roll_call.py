"""The roll call of a run's processes at its start: none trains unless all are there, and were started alike.

Process 0 listens at the coordinator's address until all have come; then jax listens there. Whoever reaches that port
can connect. Where all processes are given the same `AIMV2_JAX_SECRET`, each proves by it that it belongs to the run,
and one that was started otherwise ends the run for all at once. Without a secret it may be anybody: only that one is
refused, process 0 says so, and waits on. Needs no jax.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import hmac
import json
import selectors
import socket
import sys
import time
from collections.abc import Mapping

from aimv2_jax.console import print_line
from aimv2_jax.errors import UserError
from aimv2_jax.parallel.clusters import Place
from aimv2_jax.parallel.links import Link, Message
from aimv2_jax.untrusted import as_int, printable

SECRET = "AIMV2_JAX_SECRET"  # Of the environment.
_RETRY_S = 0.2  # Between two tries to reach process 0.
_ANSWER_S = 5.0  # For process 0 to answer after the time-out, and for a new connection to say who it is.
_SHOWN = 20  # Processes, differences or refusals that a line names.
_MAX_PROCESSES = 1_000_000
_MAX_FACTS = 100
_MAX_TEXT = 5000  # Characters of a text that another process sends: a path has up to 4096.
_MAX_UNKNOWN = 64  # Connections besides one a process that have not said yet who they are.


@dataclasses.dataclass(frozen=True)
class Team:
    """All processes: their hosts, and the links of this one: to all others from process 0, from them to process 0."""

    hosts: Mapping[int, str]
    links: Mapping[int, Link]


@dataclasses.dataclass(frozen=True)
class _Hello:
    """What a process says of itself; `facts`: what all must have alike."""

    index: int
    host: str
    count: int
    facts: Mapping[str, str]

    def message(self, secret: bytes) -> Message:
        return dataclasses.asdict(self) | {"proof": self.proof(secret)}

    def proof(self, secret: bytes) -> str:
        """What only a process with the secret can tell; "" without one."""
        said = json.dumps([self.index, self.host, self.count, sorted(self.facts.items())]).encode()
        return hmac.new(secret, said, hashlib.sha256).hexdigest() if secret else ""

    def __str__(self) -> str:
        return f"process {self.index} on {printable(self.host)}"


def _read_hello(message: Message) -> _Hello:
    """Raises ValueError for what is none."""
    count = as_int(message.get("count"), 1, _MAX_PROCESSES)
    facts = _texts(message.get("facts", {}))  # A version that sends none is told so.
    return _Hello(as_int(message.get("index"), 0, count - 1), _text(message.get("host")), count, facts)


def _text(value: object) -> str:
    if not isinstance(value, str) or len(value) > _MAX_TEXT:
        raise ValueError("no text, or too long")
    return value


def _texts(value: object) -> dict[str, str]:
    if not isinstance(value, dict) or len(value) > _MAX_FACTS:
        raise ValueError("no table of texts, or too long")
    return {_text(name): _text(text) for name, text in value.items()}


def call_roll(place: Place, host: str, facts: Mapping[str, str], timeout_s: float, secret: bytes = b"") -> Team:
    """Waits until all processes of the run have come.

    Args:
      host: this one's.
      facts: what all must have alike.
      secret: of the run, the same for all; b"": it has none.

    Raises:
      UserError: on every process that came, naming those that are there and those that are missing after `timeout_s`;
        or who was started otherwise, or twice: on all with a secret, on that one and after `timeout_s` without.
    """
    me = _Hello(place.index, host, place.count, facts)
    if place.index == 0:
        return _Gathering(place, me, secret, timeout_s).run()
    return _report(place, me, secret, timeout_s)


class _Gathering:
    """Process 0's part."""

    def __init__(self, place: Place, me: _Hello, secret: bytes, timeout_s: float):
        self._place, self._me, self._secret, self._timeout_s = place, me, secret, timeout_s
        self._came: dict[int, tuple[_Hello, Link]] = {}
        self._unknown: dict[Link, float] = {}  # Since when, the oldest first.
        self._refused: list[str] = []

    def run(self) -> Team:
        deadline_s = time.monotonic() + self._timeout_s
        with _listener(self._place) as listener, selectors.DefaultSelector() as self._selector:
            self._selector.register(listener, selectors.EVENT_READ)
            while len(self._came) < self._place.count - 1:
                if time.monotonic() > deadline_s:
                    self._refuse_all(self._absent())
                if any(key.fileobj is listener for key, _ in self._selector.select(0.1)):
                    self._accept(listener)
                for link, since_s in list(self._unknown.items()):
                    self._hear(link, since_s)
                for index, (_, link) in list(self._came.items()):
                    if _has_died(link):
                        del self._came[index]
                        link.close()
        for link in self._unknown:
            link.close()
        hosts = {0: self._me.host} | {i: printable(hello.host) for i, (hello, _) in sorted(self._came.items())}
        links = {index: link for index, (_, link) in self._came.items()}
        for link in links.values():
            link.send({"hosts": hosts})
        return Team(hosts, links)

    def _accept(self, listener: socket.socket) -> None:
        with contextlib.suppress(OSError):  # No other waits, or it has gone again.
            for _ in range(_MAX_UNKNOWN):
                link = Link(listener.accept()[0])
                self._unknown[link] = time.monotonic()
                self._selector.register(link, selectors.EVENT_READ)
                if len(self._unknown) > self._place.count + _MAX_UNKNOWN:
                    self._forget(next(iter(self._unknown)))

    def _forget(self, link: Link, close: bool = True) -> None:
        del self._unknown[link]
        self._selector.unregister(link)
        if close:
            link.close()

    def _hear(self, link: Link, since_s: float) -> None:
        """Takes in a process that says it is one of the run, or refuses it; a stranger only loses his connection."""
        messages = link.receive()
        if not messages:
            if link.closed or time.monotonic() > since_s + _ANSWER_S:
                self._forget(link)
            return
        try:
            hello = _read_hello(messages[0])
            proof = _text(messages[0].get("proof", ""))
        except ValueError:
            self._forget(link)
            return
        reason = self._mismatch(hello)
        if not hmac.compare_digest(proof.encode(errors="replace"), hello.proof(self._secret).encode()):
            remedy = "Give all processes of the run the same secret, or none"
            self._refuse(link, UserError(f"{hello} has not the secret of process 0", SECRET, remedy))
        elif reason is None:
            self._forget(link, close=False)
            self._came[hello.index] = hello, link
        elif self._secret:
            self._refuse_all(reason)
        else:
            self._refuse(link, reason)

    def _mismatch(self, hello: _Hello) -> UserError | None:
        """What is wrong with one that has come, or None."""
        me = self._me
        if hello.count != me.count:
            what = f"{hello} has another number of processes than process 0's {me.count}"
            return UserError(what, hello.count, "Start all processes with the same command")
        differences = [
            f"{printable(name)} {printable(hello.facts.get(name, 'none'))} (process 0: {me.facts.get(name, 'none')})"
            for name in dict.fromkeys([*me.facts, *hello.facts])
            if hello.facts.get(name) != me.facts.get(name)
        ]
        if differences:
            what = f"{hello} was started otherwise than process 0 on {me.host}"
            remedy = "Start the same command with the same Python and packages on all hosts"
            return UserError(what, ", ".join(differences[:_SHOWN]), remedy)
        if hello.index == 0 or hello.index in self._came:
            other = me if hello.index == 0 else self._came[hello.index][0]
            both = f"{printable(other.host)} and {printable(hello.host)}"
            return UserError(f"two processes have --process {hello.index}", both, "Give each its own")
        return None

    def _refuse(self, link: Link, reason: UserError) -> None:
        """Tells one why it is refused, and the user once."""
        _send_refusal(link, reason)
        self._forget(link)
        if str(reason) not in self._refused and len(self._refused) < _SHOWN:
            self._refused.append(str(reason))
            print_line(f"refused, and waiting for another: {reason}", sys.stderr)

    def _refuse_all(self, reason: UserError) -> None:
        """Tells all that have come why the run does not start, and raises it here."""
        for link in [*self._unknown, *(link for _, link in self._came.values())]:
            _send_refusal(link, reason)
            link.close()
        raise reason

    def _absent(self) -> UserError:
        """That some are missing, and who."""
        place = self._place
        there = {0: self._me.host} | {index: printable(hello.host) for index, (hello, _) in self._came.items()}
        missing = {index: place.hosts.get(index, "host unknown") for index in range(place.count) if index not in there}
        refused = f"; refused was: {self._refused[0]}" if self._refused else ""
        what = (
            f"only {len(there)} of {place.count} processes have come within {self._timeout_s:g} s "
            f"(processes.startup_timeout_s); there are {_listed(there)}{refused}; missing"
        )
        return UserError(what, _listed(missing), "Start the same command on the missing hosts, too, or look after them")


def _has_died(link: Link) -> bool:
    link.receive()
    return link.closed


def _send_refusal(link: Link, reason: UserError) -> None:
    link.send({"refused": [reason.what, str(reason.value), reason.remedy]})


def _listener(place: Place) -> socket.socket:
    host, _, port = place.bind_address.rpartition(":")
    host, backlog = host.strip("[]"), place.count + _MAX_UNKNOWN
    every = host == "::"
    try:
        if every and not socket.has_dualstack_ipv6():
            listener = socket.create_server(("", int(port)), backlog=backlog)
        else:
            family = socket.AF_INET6 if ":" in host else socket.AF_INET
            listener = socket.create_server((host, int(port)), family=family, backlog=backlog, dualstack_ipv6=every)
    except OSError as error:
        remedy = "Give a free port of that host, the same on all processes, and --process 0 to one of them only"
        raise UserError(f"--coordinator cannot be listened on ({error.strerror})", place.coordinator, remedy) from error
    listener.setblocking(False)
    return listener


def _listed(hosts: Mapping[int, str]) -> str:
    named = [f"{index} ({name})" for index, name in sorted(hosts.items())]
    more = f", and {len(named) - _SHOWN} more" if len(named) > _SHOWN else ""
    return ", ".join(named[:_SHOWN]) + more


def _report(place: Place, me: _Hello, secret: bytes, timeout_s: float) -> Team:
    """The part of all but process 0."""
    start_s = time.monotonic()
    deadline_s = start_s + timeout_s
    link = None
    while time.monotonic() < deadline_s:
        if link is None:
            with contextlib.suppress(OSError):
                link = Link(socket.create_connection(place.address, timeout=5 * _RETRY_S))
                link.send(me.message(secret))
                # Process 0 is there, maybe since a moment ago, and its time-out tells more.
                deadline_s = min(time.monotonic(), start_s + timeout_s) + timeout_s + _ANSWER_S
            if link is None:
                time.sleep(_RETRY_S)
                continue
        with selectors.DefaultSelector() as selector:
            selector.register(link, selectors.EVENT_READ)
            selector.select(_RETRY_S)
        try:
            for message in link.receive():
                return Team(_hosts(message, place.count), {0: link})
        except UserError:
            link.close()
            raise
        except ValueError:  # Another program has that port.
            link.close()
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


def _hosts(message: Message, count: int) -> dict[int, str]:
    """The hosts of all, from process 0's answer.

    Raises:
      UserError: where it refuses this process.
      ValueError: for what no process 0 answers.
    """
    if "refused" in message:
        words = message["refused"]
        if not isinstance(words, list) or len(words) != 3:
            raise ValueError("no refusal")
        raise UserError(*(printable(_text(word), _MAX_TEXT) for word in words))
    hosts = message.get("hosts")
    if not isinstance(hosts, dict) or hosts.keys() != {str(index) for index in range(count)}:
        raise ValueError("no hosts")
    return {int(index): printable(_text(name)) for index, name in hosts.items()}
