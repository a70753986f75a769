"""Supervisor of one of several trainers: starts it, writes its log and stops it when another process is missing.

A trainer cannot do that itself. When a process dies, the collectives of the others hang or fail. When it was process 0,
jax's runtime ends the others from C++ within milliseconds, with a long message that names no process. A supervisor
imports no jax that could fail, so it can always report.

Each supervisor sends how its trainer ended. Process 0's supervisor collects these reports, decides which of them ended
the run, and sends this verdict to all. When process 0 is missing, each of the others decides that by itself.

A trainer that hangs reports it before it exits (resilience/watchdog.py). Each supervisor then first makes its own
trainer, which usually waits for the hung one, write the stacks of its threads to its log.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import queue
import selectors
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, BinaryIO, TextIO

from etils import epath

from aimv2_jax.config.load import config_digest
from aimv2_jax.config.schema import Config, ProcessesConfig
from aimv2_jax.console import print_line
from aimv2_jax.distributed.cluster import ProcessInfo
from aimv2_jax.distributed.coordination import trainer_environment
from aimv2_jax.distributed.crash_count import MAX_KILLS, count_kill_within
from aimv2_jax.distributed.parent import signals_passed_on
from aimv2_jax.distributed.rendezvous import SECRET, ProcessGroup, rendezvous
from aimv2_jax.errors import (
    EXIT_FINISHED,
    EXIT_GUARD,
    EXIT_HUNG,
    EXIT_INTERRUPTED,
    EXIT_RETRY,
    EXIT_USER,
    UserError,
)
from aimv2_jax.storage.append import AppendFile
from aimv2_jax.version import installed_versions

# A process is missing after this share of the heartbeat timeout; the rest is left for shutting down.
_SILENCE_FRACTION = 0.7
_HEARTBEATS_PER_TIMEOUT = 10
# Wait after a trainer crashed: a missing process may be the cause, which its supervisor then reports.
_CRASH_GRACE_S = 3.0
# Wait after a trainer exited with a reason: the others may exit for the same reason and may still finish a save.
_UNWIND_S = 30.0
_FLUSH_TIMEOUT_S = 5.0  # Limit for flushing the remaining output at exit.
_STACK_DUMP_S = 1.0  # Time for a healthy trainer to write its stacks while another one hangs.
_HUNG_EXIT_S = 30.0  # Time for a trainer that reported a hang to exit; it never needs all of it.
_PIPE_DRAIN_S = 1.0  # Data workers keep a trainer's pipes open until they exit.


@dataclasses.dataclass(frozen=True)
class ExitReport:
    """Report of how a process ended.

    Args:
      code: its exit code, which becomes that of all processes.
      text: its own message about the exit.
      clean: whether it ended together with all others: finished, or stopped on request.
      missing_reason: why it is missing, if it could not report anything.
      hung: whether it is about to exit because it hangs.
      killed: whether its trainer was ended by a signal that is not a request to stop.
    """

    index: int
    code: int
    text: str = ""
    clean: bool = False
    missing_reason: str | None = None
    hung: bool = False
    killed: bool = False


class Supervisor:
    """Supervises the trainer of `process` until the run ends.

    Args:
      group: the result of the rendezvous.
      log: receives all output of the trainer; process 0 also copies it to its own output.
      workdir: workdir of the run, in which process 0 counts killed trainers.
    """

    def __init__(
        self,
        process: ProcessInfo,
        group: ProcessGroup,
        settings: ProcessesConfig,
        log: AppendFile,
        workdir: epath.PathLike,
    ):
        self._process = process
        self._group = group
        self._log = log
        self._workdir = workdir
        self._timeout_s = settings.heartbeat_timeout_s
        self._barrier_s = settings.barrier_timeout_s
        self._is_process_0 = process.index == 0
        self._writer = _Writer()
        self._exits: dict[int, ExitReport] = {}
        self._verdict: ExitReport | None = None
        self._verdict_due_s: float | None = None  # Time at which the verdict is decided.
        self._wait_until_s = 0.0  # Deadline for the other processes once this trainer has ended.
        self._partial_line = b""  # Unfinished line of the trainer's exit report.
        self._exit_text = ""  # The trainer's own message about its exit.
        self._ended_s: float | None = None  # Time at which the trainer ended.
        self._heartbeat_s = 0.0  # Time of the last heartbeat to the others.

    def run(self, command: Sequence[str]) -> int:
        """Starts the trainer by `command`, waits for the end of the run and returns this process' exit code."""
        own_socket, trainer_socket = socket.socketpair()
        # The trainer gets its own session, so a terminal's Ctrl-C reaches it once, through this process.
        self._trainer = subprocess.Popen(
            command,
            env=trainer_environment(self._process, trainer_socket.fileno()),
            pass_fds=[trainer_socket.fileno()],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,
        )
        trainer_socket.close()
        out, err = self._trainer.stdout, self._trainer.stderr
        assert out is not None and err is not None
        with signals_passed_on(self._trainer), selectors.DefaultSelector() as self._selector:
            self._pipes = {
                own_socket: lambda: self._read_trainer_report(own_socket),
                out: lambda: self._forward_output(out, sys.stdout),
                err: lambda: self._forward_output(err, sys.stderr),
            }
            for file, callback in self._pipes.items():
                os.set_blocking(file.fileno(), False)
                self._selector.register(file, selectors.EVENT_READ, callback)
            for index, connection in self._group.connections.items():
                self._selector.register(connection, selectors.EVENT_READ, partial(self._read_supervisor, index))
            try:
                while not self._is_over():
                    self._poll()
                if any(report.hung for report in [*self._exits.values(), self._verdict] if report is not None):
                    self._wait_for_stacks()
            finally:
                self._trainer.kill()
                self._trainer.wait()
            deadline_s = time.monotonic() + _PIPE_DRAIN_S
            while time.monotonic() < deadline_s and (self._pipes or self._is_verdict_undelivered()):
                self._poll()
        for file in (own_socket, out, err, *self._group.connections.values()):
            file.close()
        code = self._report_exit()
        self._writer.close()
        return code

    def _wait_for_stacks(self) -> None:
        """Waits until this trainer has written the stacks of its threads, because some process hangs."""
        start_s = time.monotonic()
        if self._process.index not in self._exits and self._trainer.poll() is None:
            self._trainer.send_signal(signal.SIGUSR1)
        while self._trainer.poll() is None:
            # A trainer that has an exit report hangs itself and may still be writing its stacks.
            limit_s = _HUNG_EXIT_S if self._process.index in self._exits else _STACK_DUMP_S
            if time.monotonic() > start_s + limit_s:
                break
            self._poll()

    def _is_verdict_undelivered(self) -> bool:
        """Whether some process may not have received process 0's verdict: a process that has it closes its side."""
        all_closed = all(connection.closed for connection in self._group.connections.values())
        return self._is_process_0 and self._verdict is not None and not all_closed

    def _poll(self) -> None:
        """Handles incoming data, or waits for it briefly, then checks the timeouts."""
        for key, _ in self._selector.select(min(0.2, self._timeout_s / (2 * _HEARTBEATS_PER_TIMEOUT))):
            if not key.data():
                self._selector.unregister(key.fileobj)
                self._pipes.pop(key.fileobj, None)
        now_s = time.monotonic()
        if now_s >= self._heartbeat_s + self._timeout_s / _HEARTBEATS_PER_TIMEOUT:
            self._heartbeat_s = now_s
            self._send({"beat": True})
        for index, connection in self._group.connections.items():
            connection.flush()
            silence_s = now_s - connection.heard_s
            if index not in self._exits and silence_s > _SILENCE_FRACTION * self._timeout_s:
                self._record(ExitReport(index, EXIT_RETRY, missing_reason=f"no heartbeat for {silence_s:.0f} s"))
        if self._trainer.poll() is not None and self._process.index not in self._exits:
            self._ended_s = self._ended_s or now_s
            if not self._pipes or now_s > self._ended_s + _PIPE_DRAIN_S:
                self._handle_trainer_exit()
        if self._verdict_due_s is not None and (
            now_s >= self._verdict_due_s or len(self._exits) == self._process.count
        ):
            self._decide(next(report for report in self._exits.values() if not report.clean))

    def _send(self, message: Mapping[str, Any]) -> None:
        for connection in self._group.connections.values():
            connection.send(message)

    def _is_over(self) -> bool:
        if self._verdict is not None:
            return True
        own = self._exits.get(self._process.index)
        if own is None:
            return False
        if time.monotonic() > self._wait_until_s:
            return True
        if not self._is_process_0:  # Process 0's verdict may have another code than its own exit.
            return own.clean or self._group.connections[0].closed
        return len(self._exits) == self._process.count

    # --- input: each handler returns False at the end of its stream --------------------------------------------------

    def _forward_output(self, pipe: BinaryIO, output: TextIO) -> bool:
        """Copies output of the trainer to the log, and on process 0 to this process' output."""
        try:
            data = os.read(pipe.fileno(), 1 << 16)
        except BlockingIOError:
            return True
        self._write(data, output if self._is_process_0 else None)
        return bool(data)

    def _read_trainer_report(self, channel: socket.socket) -> bool:
        """Reads the trainer's exit report and logs it; process 0 prints it later if this exit ended the run."""
        try:
            data = channel.recv(1 << 20)
        except BlockingIOError:
            return True
        except OSError:
            data = b""
        *lines, self._partial_line = (self._partial_line + data).split(b"\n")
        for line in lines:
            message = json.loads(line)
            self._exit_text = message["text"].rstrip()
            self._write_line(self._exit_text, to_stderr=False)
            if message.get("hung"):
                self._announce_exit(ExitReport(self._process.index, message["code"], self._exit_text, hung=True))
        return bool(data)

    def _read_supervisor(self, index: int) -> bool:
        connection = self._group.connections[index]
        for message in connection.receive():
            if "end" in message:
                self._record(ExitReport(**message["end"]))
            if "verdict" in message:
                self._verdict = self._verdict or ExitReport(**message["verdict"])
        if connection.closed and index not in self._exits:
            self._record(ExitReport(index, EXIT_RETRY, missing_reason="its connection was lost"))
        return not connection.closed

    # --- output ------------------------------------------------------------------------------------------------------

    def _write(self, data: bytes, output: TextIO | None, logged: bool = True) -> None:
        if logged and data:
            self._writer.put(self._log.write, data)
        if output is not None and data:
            self._writer.put(partial(_write, output), data)

    def _write_line(self, line: str, to_stderr: bool, logged: bool = True) -> None:
        self._write(line.encode(errors="replace") + b"\n", sys.stderr if to_stderr else None, logged)

    # --- the verdict: which exit ended the run -----------------------------------------------------------------------

    def _handle_trainer_exit(self) -> None:
        code, text = self._trainer.returncode, self._exit_text
        # A trainer that failed has sent a text, also with code 75.
        clean = code in (EXIT_FINISHED, EXIT_RETRY) and not text
        missing_reason, killed = None, False
        if code < 0:
            number = signal.Signals(-code)
            text = f"its trainer was ended by {number.name}"
            killed = number not in (signal.SIGTERM, signal.SIGINT)  # These arrived during startup or shutdown.
            # SIGABRT usually comes from jax, whose own heartbeat found another process missing.
            missing_reason = text if killed and number != signal.SIGABRT else None
            code = EXIT_INTERRUPTED if number == signal.SIGINT else EXIT_RETRY
        self._announce_exit(ExitReport(self._process.index, code, text, clean, missing_reason, killed=killed))

    def _announce_exit(self, report: ExitReport) -> None:
        """Records the exit of this process' trainer and sends it to the others."""
        self._wait_until_s = time.monotonic() + (self._barrier_s if report.clean else _UNWIND_S + self._timeout_s)
        # Process 0's verdict must be sent before its own exit: the others take the verdict's code.
        self._record(report)
        self._send({"end": dataclasses.asdict(report)})

    def _record(self, report: ExitReport) -> None:
        """Records how a process ended. Process 0 decides the verdict; without process 0, each process does."""
        self._exits.setdefault(report.index, report)
        if (report.missing_reason is not None or report.hung) and (self._is_process_0 or report.index == 0):
            self._decide(report)
        elif not report.clean and self._is_process_0:
            has_reason = report.code in (EXIT_USER, EXIT_GUARD, EXIT_RETRY, EXIT_INTERRUPTED)
            due_s = time.monotonic() + (_UNWIND_S if has_reason else _CRASH_GRACE_S)
            self._verdict_due_s = min(due_s, self._verdict_due_s or due_s)

    def _decide(self, report: ExitReport) -> None:
        self._verdict_due_s = None
        if self._verdict is None:
            if report.killed and self._is_process_0:
                report = _count_kill(report, self._workdir)
            self._verdict = report
            if self._is_process_0:
                self._send({"verdict": dataclasses.asdict(report)})

    def _report_exit(self) -> int:
        """Prints the final message and returns the exit code."""
        own = self._exits.get(self._process.index)
        verdict = self._verdict or own
        assert verdict is not None
        host = self._group.hosts[verdict.index]
        if verdict.missing_reason is not None:
            remedy = "Run the same command on all hosts to resume from the newest checkpoint"
            if verdict.code == EXIT_HUNG:
                remedy = "Check the system log of that host: SIGKILL usually means the OOM killer"
            what = f"process {verdict.index} on {host} is missing ({verdict.missing_reason}); this ends the run"
            self._write_line(f"error: {what}. {remedy}", to_stderr=True)
            code = verdict.code
        elif own is not None and own.code == verdict.code and not own.killed:
            # A trainer that was killed may have been killed by this process.
            if own.text:
                self._write_line(own.text, to_stderr=self._is_process_0, logged=False)  # The log already has it.
            code = own.code
        else:
            reason = (verdict.text.splitlines() or ["see its log"])[-1]
            line = f"error: process {verdict.index} on {host} ended with code {verdict.code}: {reason}"
            self._write_line(line, to_stderr=self._is_process_0)
            code = verdict.code
        return own.code if own is not None and own.clean else code


def _count_kill(report: ExitReport, workdir: epath.PathLike) -> ExitReport:
    """Counts a killed trainer; the code asks for a restart unless earlier restarts reached no new checkpoint."""
    kills = count_kill_within(workdir)
    if kills < MAX_KILLS:
        return dataclasses.replace(report, missing_reason=report.text)
    reason = f"{report.text}; trainers were killed {kills} times since the newest checkpoint"
    return dataclasses.replace(report, missing_reason=reason, code=EXIT_HUNG)


class _Writer:
    """Writer thread: a paused terminal (Ctrl-S) or a slow disk must not block the supervisor."""

    def __init__(self) -> None:
        self._queue: queue.SimpleQueue[tuple[Callable[[bytes], Any], bytes] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="writer", daemon=True)
        self._thread.start()

    def put(self, write: Callable[[bytes], Any], data: bytes) -> None:
        self._queue.put((write, data))

    def close(self) -> None:
        """Waits until everything is written, at most `_FLUSH_TIMEOUT_S`."""
        self._queue.put(None)
        self._thread.join(_FLUSH_TIMEOUT_S)

    def _run(self) -> None:
        while (item := self._queue.get()) is not None:
            write, data = item
            with contextlib.suppress(Exception):  # A full disk or a closed pipe must not end the run.
                write(data)


def _write(output: TextIO, data: bytes) -> None:
    output.flush()
    output.buffer.write(data)
    output.buffer.flush()


def supervise(process: ProcessInfo, config: Config, workdir: epath.PathLike, arguments: Sequence[str]) -> int:
    """Runs `python -m aimv2_jax.main` with `arguments` as one of several processes and returns the exit code.

    Raises:
      UserError: if other processes are missing, or were started differently.
    """
    facts = installed_versions() | {"workdir": os.fspath(workdir), "config": config_digest(config)}
    # The secret is removed from the environment of the trainer and its data workers.
    secret = os.environ.pop(SECRET, "").encode(errors="surrogateescape")
    group = rendezvous(process, socket.gethostname(), facts, config.processes.startup_timeout_s, secret)
    file = log_file(workdir, process.index)
    log = AppendFile(file)
    now = time.strftime("%Y-%m-%d %H:%M:%S")
    with _log_errors(file):
        log.write(f"--- {now}: process {process.index} of {process.count} on {group.hosts[process.index]}\n".encode())
    code = Supervisor(process, group, config.processes, log, workdir).run(
        [sys.executable, "-m", "aimv2_jax.main", *arguments]
    )
    try:
        with _log_errors(file):
            log.close()
    except UserError as error:  # A failure to close the log does not change the exit code.
        print_line(f"error: {error}", sys.stderr)
    return code


@contextlib.contextmanager
def _log_errors(file: epath.Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error)
        remedy = "Give a --workdir that all hosts can reach and write to"
        raise UserError(f"the log {file} cannot be written", reason, remedy) from error


def log_file(workdir: epath.PathLike, index: int) -> epath.Path:
    """Path of the log of process `index` of several."""
    return epath.Path(workdir) / "logs" / f"process_{index:05d}.log"
