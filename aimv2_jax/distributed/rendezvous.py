"""Rendezvous of a run's processes at startup: training starts once all have joined with the same command.

Process 0 listens at the coordinator's address until all processes have joined; then jax listens there. Anyone who can
reach that port can connect. If all processes are given the same `AIMV2_JAX_SECRET`, each proves with it that it belongs
to the run, and a process that was started differently ends the run for all at once. Without a secret such a process may
be a stranger: process 0 refuses only that one, logs the refusal and keeps waiting. Needs no jax.
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
from aimv2_jax.distributed.cluster import ProcessInfo
from aimv2_jax.distributed.messages import Connection, Message
from aimv2_jax.errors import UserError
from aimv2_jax.untrusted import as_int, printable

SECRET = "AIMV2_JAX_SECRET"  # Environment variable.
_RETRY_S = 0.2
# Time for a new connection to send its hello, and for process 0 to answer after its startup timeout.
_ANSWER_TIMEOUT_S = 5.0
_MAX_SHOWN = 20  # Items that one line names: processes, differences or refusals.
_MAX_PROCESSES = 1_000_000
_MAX_FACTS = 100
_MAX_TEXT_LENGTH = 5000  # Characters of one received text; a path has up to 4096.
_MAX_PENDING = 64  # Connections without a hello, in addition to one per process.


@dataclasses.dataclass(frozen=True)
class ProcessGroup:
    """Hosts of all processes, and this one's connections: process 0 has one to every other, these have one to it."""

    hosts: Mapping[int, str]
    connections: Mapping[int, Connection]


@dataclasses.dataclass(frozen=True)
class _Hello:
    """First message of a process; all processes must have equal `facts`."""

    index: int
    host: str
    count: int
    facts: Mapping[str, str]

    def message(self, secret: bytes) -> Message:
        return dataclasses.asdict(self) | {"proof": self.proof(secret)}

    def proof(self, secret: bytes) -> str:
        """HMAC of the message under the secret; "" without a secret."""
        content = json.dumps([self.index, self.host, self.count, sorted(self.facts.items())]).encode()
        return hmac.new(secret, content, hashlib.sha256).hexdigest() if secret else ""

    def __str__(self) -> str:
        return f"process {self.index} on {printable(self.host)}"


def _read_hello(message: Message) -> _Hello:
    """Parses a hello; raises ValueError for any other message."""
    count = as_int(message.get("count"), 1, _MAX_PROCESSES)
    facts = _texts(message.get("facts", {}))  # A version that sends no facts gets a mismatch as its answer.
    return _Hello(as_int(message.get("index"), 0, count - 1), _text(message.get("host")), count, facts)


def _text(value: object) -> str:
    if not isinstance(value, str) or len(value) > _MAX_TEXT_LENGTH:
        raise ValueError("no text, or too long")
    return value


def _texts(value: object) -> dict[str, str]:
    if not isinstance(value, dict) or len(value) > _MAX_FACTS:
        raise ValueError("no table of texts, or too long")
    return {_text(name): _text(text) for name, text in value.items()}


def rendezvous(
    process: ProcessInfo, host: str, facts: Mapping[str, str], timeout_s: float, secret: bytes = b""
) -> ProcessGroup:
    """Waits until all processes of the run have joined.

    Args:
      host: name of this process' host.
      facts: values that must be equal on all processes.
      secret: the run's secret, the same on all processes; b"" for a run without one.

    Raises:
      UserError: after `timeout_s`, on every process that joined, naming the joined and the missing processes. Also for
        a process that was started differently or twice: at once on all processes if the run has a secret; otherwise
        at once on that process, and on the others after `timeout_s`.
    """
    hello = _Hello(process.index, host, process.count, facts)
    if process.index == 0:
        return _RendezvousServer(process, hello, secret, timeout_s).run()
    return _connect_to_process_0(process, hello, secret, timeout_s)


class _RendezvousServer:
    """Process 0's side of the rendezvous."""

    def __init__(self, process: ProcessInfo, hello: _Hello, secret: bytes, timeout_s: float):
        self._process = process
        self._hello = hello
        self._secret = secret
        self._timeout_s = timeout_s
        self._joined: dict[int, tuple[_Hello, Connection]] = {}
        self._pending: dict[Connection, float] = {}  # Time of each connection, the oldest first.
        self._refused: list[str] = []

    def run(self) -> ProcessGroup:
        deadline_s = time.monotonic() + self._timeout_s
        with _listener(self._process) as listener, selectors.DefaultSelector() as self._selector:
            self._selector.register(listener, selectors.EVENT_READ)
            while len(self._joined) < self._process.count - 1:
                if time.monotonic() > deadline_s:
                    self._refuse_all(self._missing_error())
                if any(key.fileobj is listener for key, _ in self._selector.select(0.1)):
                    self._accept(listener)
                for connection, since_s in list(self._pending.items()):
                    self._admit(connection, since_s)
                for index, (_, connection) in list(self._joined.items()):
                    if _is_closed(connection):
                        del self._joined[index]
                        connection.close()
        for connection in self._pending:
            connection.close()
        hosts = {0: self._hello.host} | {i: printable(hello.host) for i, (hello, _) in sorted(self._joined.items())}
        connections = {index: connection for index, (_, connection) in self._joined.items()}
        for connection in connections.values():
            connection.send({"hosts": hosts})
        return ProcessGroup(hosts, connections)

    def _accept(self, listener: socket.socket) -> None:
        with contextlib.suppress(OSError):  # The queue is empty, or the client has already disconnected.
            for _ in range(_MAX_PENDING):
                connection = Connection(listener.accept()[0])
                self._pending[connection] = time.monotonic()
                self._selector.register(connection, selectors.EVENT_READ)
                if len(self._pending) > self._process.count + _MAX_PENDING:
                    self._remove(next(iter(self._pending)))

    def _remove(self, connection: Connection, close: bool = True) -> None:
        del self._pending[connection]
        self._selector.unregister(connection)
        if close:
            connection.close()

    def _admit(self, connection: Connection, since_s: float) -> None:
        """Admits or refuses a process of the run; closes the connection of anything that sends no valid hello."""
        messages = connection.receive()
        if not messages:
            if connection.closed or time.monotonic() > since_s + _ANSWER_TIMEOUT_S:
                self._remove(connection)
            return
        try:
            hello = _read_hello(messages[0])
            proof = _text(messages[0].get("proof", ""))
        except ValueError:
            self._remove(connection)
            return
        reason = self._mismatch(hello)
        if not hmac.compare_digest(proof.encode(errors="replace"), hello.proof(self._secret).encode()):
            remedy = "Give all processes of the run the same secret, or none"
            self._refuse(connection, UserError(f"{hello} does not have the secret of process 0", SECRET, remedy))
        elif reason is None:
            self._remove(connection, close=False)
            self._joined[hello.index] = hello, connection
        elif self._secret:
            self._refuse_all(reason)
        else:
            self._refuse(connection, reason)

    def _mismatch(self, hello: _Hello) -> UserError | None:
        """Returns why a process cannot join, or None if it can."""
        own = self._hello
        if hello.count != own.count:
            what = f"{hello} has a different number of processes than process 0, which has {own.count}"
            return UserError(what, hello.count, "Start all processes with the same command")
        differences = [
            f"{printable(name)} {printable(hello.facts.get(name, 'none'))} (process 0: {own.facts.get(name, 'none')})"
            for name in dict.fromkeys([*own.facts, *hello.facts])
            if hello.facts.get(name) != own.facts.get(name)
        ]
        if differences:
            what = f"{hello} was started differently from process 0 on {own.host}"
            remedy = "Start the same command with the same Python and packages on all hosts"
            return UserError(what, ", ".join(differences[:_MAX_SHOWN]), remedy)
        if hello.index == 0 or hello.index in self._joined:
            other = own if hello.index == 0 else self._joined[hello.index][0]
            both = f"{printable(other.host)} and {printable(hello.host)}"
            return UserError(f"two processes have --process {hello.index}", both, "Give each process its own index")
        return None

    def _refuse(self, connection: Connection, reason: UserError) -> None:
        """Sends a process the reason of its refusal, and prints each reason once."""
        _send_refusal(connection, reason)
        self._remove(connection)
        if str(reason) not in self._refused and len(self._refused) < _MAX_SHOWN:
            self._refused.append(str(reason))
            print_line(f"refused a process, still waiting: {reason}", sys.stderr)

    def _refuse_all(self, reason: UserError) -> None:
        """Sends all connected processes the reason why the run does not start, and raises it here."""
        for connection in [*self._pending, *(connection for _, connection in self._joined.values())]:
            _send_refusal(connection, reason)
            connection.close()
        raise reason

    def _missing_error(self) -> UserError:
        """Error that names the joined and the missing processes."""
        process = self._process
        joined = {0: self._hello.host} | {index: printable(hello.host) for index, (hello, _) in self._joined.items()}
        missing = {i: process.hosts.get(i, "host unknown") for i in range(process.count) if i not in joined}
        refused = f"; refused: {self._refused[0]}" if self._refused else ""
        what = (
            f"only {len(joined)} of {process.count} processes joined within {self._timeout_s:g} s "
            f"(processes.startup_timeout_s); joined: {_listed(joined)}{refused}; missing"
        )
        return UserError(what, _listed(missing), "Check the missing hosts, and start the same command on them")


def _is_closed(connection: Connection) -> bool:
    connection.receive()
    return connection.closed


def _send_refusal(connection: Connection, reason: UserError) -> None:
    connection.send({"refused": [reason.what, str(reason.value), reason.remedy]})


def _listener(process: ProcessInfo) -> socket.socket:
    host, _, port = process.bind_address.rpartition(":")
    host, backlog = host.strip("[]"), process.count + _MAX_PENDING
    is_any = host == "::"
    try:
        if is_any and not socket.has_dualstack_ipv6():
            listener = socket.create_server(("", int(port)), backlog=backlog)
        else:
            family = socket.AF_INET6 if ":" in host else socket.AF_INET
            listener = socket.create_server((host, int(port)), family=family, backlog=backlog, dualstack_ipv6=is_any)
    except OSError as error:
        remedy = "Give a free port of that host, the same on all processes, and give --process 0 to only one of them"
        raise UserError(f"cannot listen on --coordinator ({error.strerror})", process.coordinator, remedy) from error
    listener.setblocking(False)
    return listener


def _listed(hosts: Mapping[int, str]) -> str:
    named = [f"{index} ({name})" for index, name in sorted(hosts.items())]
    more = f", and {len(named) - _MAX_SHOWN} more" if len(named) > _MAX_SHOWN else ""
    return ", ".join(named[:_MAX_SHOWN]) + more


def _connect_to_process_0(process: ProcessInfo, hello: _Hello, secret: bytes, timeout_s: float) -> ProcessGroup:
    """Rendezvous as every process but process 0 does it."""
    start_s = time.monotonic()
    deadline_s = start_s + timeout_s
    connection = None
    while time.monotonic() < deadline_s:
        if connection is None:
            with contextlib.suppress(OSError):
                connection = Connection(socket.create_connection(process.address, timeout=5 * _RETRY_S))
                connection.send(hello.message(secret))
                # Process 0 may just have started: wait for its timeout, whose error says more.
                deadline_s = min(time.monotonic(), start_s + timeout_s) + timeout_s + _ANSWER_TIMEOUT_S
            if connection is None:
                time.sleep(_RETRY_S)
                continue
        with selectors.DefaultSelector() as selector:
            selector.register(connection, selectors.EVENT_READ)
            selector.select(_RETRY_S)
        try:
            for message in connection.receive():
                return ProcessGroup(_hosts(message, process.count), {0: connection})
        except UserError:
            connection.close()
            raise
        except ValueError:  # Another program has that port.
            connection.close()
        if connection.closed:  # Process 0 has died, or another program answered: process 0 may still come.
            connection.close()
            connection = None
            time.sleep(_RETRY_S)
    if connection is not None:
        connection.close()
    host = process.hosts.get(0, process.address[0])
    remedy = "Start the same command on process 0's host, and check that the other hosts can reach its port"
    what = f"process 0 on {host} was not reached within {timeout_s:g} s (processes.startup_timeout_s) at"
    raise UserError(what, process.coordinator, remedy)


def _hosts(message: Message, count: int) -> dict[int, str]:
    """Hosts of all processes, from process 0's answer.

    Raises:
      UserError: if process 0 refuses this process.
      ValueError: if the message is not an answer of process 0.
    """
    if "refused" in message:
        texts = message["refused"]
        if not isinstance(texts, list) or len(texts) != 3:
            raise ValueError("no refusal")
        raise UserError(*(printable(_text(text), _MAX_TEXT_LENGTH) for text in texts))
    hosts = message.get("hosts")
    if not isinstance(hosts, dict) or hosts.keys() != {str(index) for index in range(count)}:
        raise ValueError("no hosts")
    return {int(index): printable(_text(name)) for index, name in hosts.items()}
