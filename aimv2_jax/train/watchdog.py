"""Ends a process that hangs, after it has said where: a thread that compares what goes on with the time it may take.

Where a run hangs (a disk, a collective, a lock), nobody is told, and hundreds of chips wait. What this writes is enough
to find the cause: the stacks of all threads of the process and of its data workers, and the record that was read last.
The process then ends with the code by which it is started again; unless it hung at the same step before: then it would
again.

The thread needs Python's lock. A piece of C that never gives it back is noticed by another process (heartbeat.py), to
which the thread sends a line whenever it has looked. No jax here.
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

from aimv2_jax.data import workers
from aimv2_jax.errors import EXIT_HUNG
from aimv2_jax.train.heartbeat import Heartbeat, HeartbeatMonitor
from aimv2_jax.train.interruptions import Interruptions

WATCHED = ("start", "data", "step", "evaluation", "save", "stop")
_ERRORS = 2  # The file that ends up in the log, whatever became of `sys.stderr`.
_LOOK_S = 1.0  # At most between two looks at the clock.
_PAUSE_S = 5.0  # That a look may be late on a busy machine.
_PATIENCE_S = 5.0  # With the disk, and with what the caller does: either may be what hangs.
_TOLD_S = 1.5  # From telling the watcher until the end: others' stacks are written then, and some end with this one.
_LAST_S = 20.0  # For all of it, after which the process ends wherever it is.
_BACKSTOP = 1.5  # Times the time-out: how long this thread may be silent.


class Settings(Protocol):
    """Seconds that each may take, 0: any; config `watch`."""

    start_s: float
    data_s: float
    step_s: float
    evaluation_s: float
    save_s: float
    stop_s: float


@dataclasses.dataclass(frozen=True)
class Hang:
    """What hung: `what` at `step`, for `seconds`; `code` is that with which the process ends."""

    what: str
    step: int
    process: int
    host: str
    seconds: float
    code: int

    def __str__(self) -> str:
        again = ", as it did before" if self.code == EXIT_HUNG else ""
        return (
            f"hung: process {self.process} on {self.host} waits for {self.what} at step {self.step} since "
            f"{self.seconds:.0f} s{again}"
        )


class Watchdog(contextlib.AbstractContextManager):
    """Ends the process when something of it takes longer than it may.

    Args:
      workdir: of the run; the stacks are written to `hangs/STEP-PROCESS-WHAT.txt` there.
      process_index: of this process.
      settings: how long each may take.
      say: is given the line about a hang; the log gets it anyway.
      on_hang: is given the hang, before the process ends and from a thread that nobody waits for if it hangs, too.
      tell: is given exit code and text at once: by it others learn that this process hangs before it ends.
      channel: descriptor for the same, where this process cannot tell it itself.

    Attributes:
      interruptions: those of the run.
    """

    def __init__(
        self,
        workdir: epath.PathLike,
        process_index: int,
        settings: Settings,
        say: Callable[[str], None] | None = None,
        *,
        on_hang: Callable[[Hang], None] | None = None,
        tell: Callable[[int, str], None] | None = None,
        channel: int | None = None,
    ):
        self.interruptions, self._process = Interruptions(workdir, process_index), process_index
        self._limits = {name: float(getattr(settings, f"{name}_s")) for name in WATCHED}
        self._say, self._on_hang, self._tell = say, on_hang, tell
        self._open: dict[_Watch, None] = {}  # Changed by one operation each, which no other thread sees half.
        self._closed = threading.Event()
        self._look_s = min([_LOOK_S, *(limit / 10 for limit in self._limits.values() if limit)])
        self._step = 0  # The last one at which something was watched.
        self._monitor = HeartbeatMonitor(channel)
        self._thread = threading.Thread(target=self._run, name="watchdog", daemon=True)
        self._thread.start()

    def watching(self, what: str, step: int | None = None, detail: Callable[[], str] | None = None) -> _Watch:
        """A context in which `what`, one of `WATCHED`, is going on at `step`, by default that of the one before.

        Contexts may lie in one another, and in several threads: each has its time. `detail` says more, if it comes to
        that.
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
        looked_s = time.monotonic()
        while not self._closed.wait(self._look_s):
            now_s = time.monotonic()
            watches = list(self._open)
            paused_s = now_s - looked_s - self._look_s
            looked_s = now_s
            for watch in watches:
                if paused_s > _PAUSE_S:  # The whole process was held up, and not what is being watched.
                    watch.since_s += paused_s
                if watch.limit_s and now_s - watch.since_s > watch.limit_s:
                    self._end(watch, now_s)
            self._monitor.send(self._heartbeat(watches, now_s))

    def _heartbeat(self, watches: list[_Watch], now_s: float) -> Heartbeat:
        """How long this thread may be silent, and what it is then that hangs."""
        limited = [watch for watch in watches if watch.limit_s] or [self._anything(now_s)]
        first = min(limited, key=lambda watch: watch.since_s + _BACKSTOP * watch.limit_s)
        if not first.limit_s:
            return Heartbeat(0)
        until_s = first.since_s + _BACKSTOP * first.limit_s
        hang = self._hang(first, until_s)
        file = self.interruptions.file(hang.step, hang.what)
        # What is being watched may change at once: by then, this thread has looked again.
        return Heartbeat(max(until_s - now_s, 5 * self._look_s), hang.code, str(hang), os.fspath(file))

    def _anything(self, now_s: float) -> _Watch:
        """For when nothing is being watched: Python's lock may go just then, and for good."""
        watch = _Watch(self._open, "anything", self._step, max(self._limits.values()), None)
        watch.since_s = now_s
        return watch

    def _hang(self, watch: _Watch, now_s: float) -> Hang:
        code = self.interruptions.exit_code(watch.step)
        return Hang(watch.what, watch.step, self._process, socket.gethostname(), now_s - watch.since_s, code)

    def _end(self, watch: _Watch, now_s: float) -> None:
        hang = self._hang(watch, now_s)
        code, file = hang.code, os.fspath(self.interruptions.file(hang.step, hang.what))
        last = threading.Timer(_LAST_S, os._exit, [code])
        last.name, last.daemon = "last words' limit", True
        last.start()
        self._monitor.send(Heartbeat(_LAST_S + _PATIENCE_S, code, str(hang), file))  # Python's lock may go now.
        end_s = time.monotonic()
        if self._tell is not None:
            _within(_PATIENCE_S, self._tell, code, str(hang))
            end_s = time.monotonic() + _TOLD_S
        _log(f"{hang}\n")
        faulthandler.dump_traceback(_ERRORS, all_threads=True)
        detail = _within(_PATIENCE_S, watch.detail) if watch.detail is not None else None
        if detail:
            _log(f"{detail}\n")
        _log(_thread_names())
        workers.write_stacks()
        _within(_PATIENCE_S, self._write, hang, detail or "")
        if self._on_hang is not None:
            _within(_PATIENCE_S / 2, self._on_hang, hang)
        if self._say is not None:
            _within(_PATIENCE_S / 5, self._say, str(hang))
        _within(_PATIENCE_S / 5, sys.stdout.flush)
        time.sleep(max(0.0, end_s - time.monotonic()))
        os._exit(code)

    def _write(self, hang: Hang, detail: str) -> None:
        with tempfile.TemporaryFile() as file:
            faulthandler.dump_traceback(file, all_threads=True)
            file.seek(0)
            stacks = file.read()
        moment = time.strftime("%Y-%m-%d %H:%M:%S")
        text = f"{moment}: {hang}; it ends with code {hang.code}\n{detail}\n{_thread_names()}\n"
        self.interruptions.record(hang.step, hang.what, text.encode(errors="replace") + stacks)


class _Watch(contextlib.AbstractContextManager):
    """Something that goes on since it was entered."""

    __slots__ = ("_open", "detail", "limit_s", "since_s", "step", "what")

    def __init__(self, open_: dict[_Watch, None], what: str, step: int, limit_s: float, detail: object):
        self._open, self.what, self.step, self.limit_s, self.detail = open_, what, step, limit_s, detail

    def __enter__(self) -> _Watch:
        self.since_s = time.monotonic()
        self._open[self] = None
        return self

    def __exit__(self, *exception: object) -> None:
        self._open.pop(self, None)


def register_dump_signal() -> None:
    """From now on SIGUSR1 has this process write the stacks of all its threads to the log, and go on."""
    faulthandler.register(signal.SIGUSR1, _ERRORS, all_threads=True)


def _log(text: str) -> None:
    with contextlib.suppress(OSError):  # Nobody reads it any more.
        os.write(_ERRORS, text.encode(errors="replace"))


def _thread_names() -> str:
    return "".join(f"thread 0x{one.ident or 0:016x} is {one.name}\n" for one in threading.enumerate())


def _within(seconds: float, call: Callable[..., object], *arguments: object) -> str | None:
    """What `call` returns, as text; None where it takes longer, and goes on in its thread, or fails."""
    result: list[str] = []

    def run() -> None:
        with contextlib.suppress(Exception):  # The process ends anyway.
            result.append(str(call(*arguments)))

    thread = threading.Thread(target=run, name="last words", daemon=True)
    thread.start()
    thread.join(seconds)
    return result[0] if result else None
