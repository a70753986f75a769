"""Watchdog thread that ends a hanging process and writes its stacks.

A hang (of a disk, a collective, a lock) raises no error, and hundreds of chips wait. The watchdog writes what is needed
to find the cause: the stacks of all threads of the process and of its data workers, and the record that was read last.
The process then ends with EXIT_RETRY, or with EXIT_HUNG if it hung at the same step before.

The thread needs the GIL. Another process (heartbeat.py), to which the thread sends a message after each check, detects
C code that never releases it. This module does not import jax.
"""

from __future__ import annotations

import contextlib
import dataclasses
import faulthandler
import os
import signal
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from typing import Protocol

from etils import epath

from aimv2_jax.data.loading import workers
from aimv2_jax.errors import EXIT_HUNG
from aimv2_jax.resilience.heartbeat import Heartbeat, HeartbeatMonitor
from aimv2_jax.resilience.repeated_failures import RepeatedFailures

WATCHED = ("start", "data", "step", "evaluation", "save", "stop")
_STDERR = 2  # File descriptor of the log, even if `sys.stderr` was replaced.
_MAX_CHECK_INTERVAL_S = 1.0
_MAX_CHECK_DELAY_S = 5.0  # A longer delay than this on a busy machine means that the process was suspended.
_CALL_TIMEOUT_S = 5.0  # Timeout for disk writes and callbacks: they may hang as well.
# Grace period after notifying the supervisor: other trainers write their stacks, and some end with this one.
_NOTIFIED_GRACE_S = 1.5
_END_TIMEOUT_S = 20.0  # The process ends at the latest after this time.
_HEARTBEAT_FACTOR = 1.5  # Ratio of the heartbeat's limit to the limit of the watched operation.


class Settings(Protocol):
    """Time limits in seconds, 0 for none; config `watch`."""

    start_s: float
    data_s: float
    step_s: float
    evaluation_s: float
    save_s: float
    stop_s: float


@dataclasses.dataclass(frozen=True)
class Hang:
    """A hang: `what` at `step` for `seconds`; the process ends with exit code `code`."""

    what: str
    step: int
    process: int
    host: str
    seconds: float
    code: int

    def __str__(self) -> str:
        again = ", as before" if self.code == EXIT_HUNG else ""
        return (
            f"hung: process {self.process} on {self.host} has waited for {self.what} at step {self.step} for "
            f"{self.seconds:.0f} s{again}"
        )


class Watchdog(contextlib.AbstractContextManager):
    """Ends the process when a watched operation exceeds its time limit.

    Args:
      workdir: of the run; the stacks are written to `hangs/STEP-PROCESS-WHAT.txt` there.
      process_index: of this process.
      settings: the time limits.
      on_hang: called with the hang before the process ends, in a thread and with a timeout.
      notify: called first, with exit code and text: it notifies other processes before this one ends.
      channel: descriptor for the same purpose, used by the heartbeat process.

    Attributes:
      failures: the recorded hangs and failures of the run.
    """

    def __init__(
        self,
        workdir: epath.PathLike,
        process_index: int,
        settings: Settings,
        *,
        on_hang: Callable[[Hang], None] | None = None,
        notify: Callable[[int, str], None] | None = None,
        channel: int | None = None,
    ):
        self.failures = RepeatedFailures(workdir, process_index)
        self._process = process_index
        self._limits = {name: float(getattr(settings, f"{name}_s")) for name in WATCHED}
        self._on_hang = on_hang
        self._notify = notify
        self._open: dict[_Watch, None] = {}  # Each change is one dict operation, which is atomic under the GIL.
        self._closed = threading.Event()
        self._check_interval_s = min([_MAX_CHECK_INTERVAL_S, *(limit / 10 for limit in self._limits.values() if limit)])
        self._step = 0  # The last step that was watched.
        self._monitor = HeartbeatMonitor(channel)
        self._thread = threading.Thread(target=self._run, name="watchdog", daemon=True)
        self._thread.start()

    def watching(self, what: str, step: int | None = None, detail: Callable[[], str] | None = None) -> _Watch:
        """Returns a context that watches the operation `what`, one of `WATCHED`, at `step` (by default the last one).

        Contexts may be nested and used in several threads; each has its own time limit. `detail` is called on a hang,
        for a further line of the report.
        """
        self._step = self._step if step is None else step
        return _Watch(self._open, what, self._step, self._limits[what], detail)

    def close(self) -> None:
        self._closed.set()
        self._thread.join()
        self._monitor.close()

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _run(self) -> None:
        checked_s = time.monotonic()
        while not self._closed.wait(self._check_interval_s):
            now_s = time.monotonic()
            watches = list(self._open)
            paused_s = now_s - checked_s - self._check_interval_s
            checked_s = now_s
            for watch in watches:
                if paused_s > _MAX_CHECK_DELAY_S:  # The whole process was suspended.
                    watch.since_s += paused_s
                if watch.limit_s and now_s - watch.since_s > watch.limit_s:
                    self._end_process(watch, now_s)
            self._monitor.send(self._heartbeat(watches, now_s))

    def _heartbeat(self, watches: list[_Watch], now_s: float) -> Heartbeat:
        """The time that this thread may be silent, and the hang to report after it."""
        limited = [watch for watch in watches if watch.limit_s] or [self._default_watch(now_s)]
        first = min(limited, key=lambda watch: watch.since_s + _HEARTBEAT_FACTOR * watch.limit_s)
        if not first.limit_s:
            return Heartbeat(0)
        until_s = first.since_s + _HEARTBEAT_FACTOR * first.limit_s
        hang = self._hang(first, until_s)
        file = self.failures.file(hang.step, hang.what)
        # The watches may change right after this; the lower bound gives this thread time for another check.
        return Heartbeat(max(until_s - now_s, 5 * self._check_interval_s), hang.code, str(hang), os.fspath(file))

    def _default_watch(self, now_s: float) -> _Watch:
        """A watch for times when nothing is watched: C code may take the GIL for good just then."""
        watch = _Watch(self._open, "anything", self._step, max(self._limits.values()), None)
        watch.since_s = now_s
        return watch

    def _hang(self, watch: _Watch, now_s: float) -> Hang:
        code = self.failures.exit_code(watch.step)
        return Hang(watch.what, watch.step, self._process, socket.gethostname(), now_s - watch.since_s, code)

    def _end_process(self, watch: _Watch, now_s: float) -> None:
        hang = self._hang(watch, now_s)
        code = hang.code
        file = os.fspath(self.failures.file(hang.step, hang.what))
        timer = threading.Timer(_END_TIMEOUT_S, os._exit, [code])
        timer.name = "end timeout"
        timer.daemon = True
        timer.start()
        # C code may take the GIL for good from here on.
        self._monitor.send(Heartbeat(_END_TIMEOUT_S + _CALL_TIMEOUT_S, code, str(hang), file))
        end_s = time.monotonic()
        if self._notify is not None:
            _within(_CALL_TIMEOUT_S, self._notify, code, str(hang))
            end_s = time.monotonic() + _NOTIFIED_GRACE_S
        _log(f"{hang}\n")
        faulthandler.dump_traceback(_STDERR, all_threads=True)
        detail = _within(_CALL_TIMEOUT_S, watch.detail) if watch.detail is not None else None
        if detail:
            _log(f"{detail}\n")
        _log(_thread_names())
        workers.write_stacks()
        _within(_CALL_TIMEOUT_S, self._write, hang, detail or "")
        if self._on_hang is not None:
            _within(_CALL_TIMEOUT_S / 2, self._on_hang, hang)
        _within(_CALL_TIMEOUT_S / 5, sys.stdout.flush)
        time.sleep(max(0.0, end_s - time.monotonic()))
        os._exit(code)

    def _write(self, hang: Hang, detail: str) -> None:
        with tempfile.TemporaryFile() as file:
            faulthandler.dump_traceback(file, all_threads=True)
            file.seek(0)
            stacks = file.read()
        now = time.strftime("%Y-%m-%d %H:%M:%S")
        text = f"{now}: {hang}; it ends with code {hang.code}\n{detail}\n{_thread_names()}\n"
        self.failures.record(hang.step, hang.what, text.encode(errors="replace") + stacks)


class _Watch(contextlib.AbstractContextManager):
    """A watched operation, and the time at which it began."""

    __slots__ = ("_open", "detail", "limit_s", "since_s", "step", "what")

    def __init__(self, open_: dict[_Watch, None], what: str, step: int, limit_s: float, detail: object):
        self._open = open_
        self.what = what
        self.step = step
        self.limit_s = limit_s
        self.detail = detail

    def __enter__(self) -> _Watch:
        self.since_s = time.monotonic()
        self._open[self] = None
        return self

    def __exit__(self, *exception: object) -> None:
        self._open.pop(self, None)


def register_dump_signal() -> None:
    """Installs a SIGUSR1 handler that writes the stacks of all threads to the log."""
    faulthandler.register(signal.SIGUSR1, _STDERR, all_threads=True)


def _log(text: str) -> None:
    with contextlib.suppress(OSError):  # The log may be closed.
        os.write(_STDERR, text.encode(errors="replace"))


def _thread_names() -> str:
    return "".join(f"thread 0x{thread.ident or 0:016x} is {thread.name}\n" for thread in threading.enumerate())


def _within(seconds: float, call: Callable[..., object], *arguments: object) -> str | None:
    """Calls `call` with a timeout; returns its result as text, or None on a failure or timeout."""
    result: list[str] = []

    def run() -> None:
        with contextlib.suppress(Exception):  # The process ends anyway.
            result.append(str(call(*arguments)))

    thread = threading.Thread(target=run, name="hang report", daemon=True)
    thread.start()
    thread.join(seconds)
    return result[0] if result else None
