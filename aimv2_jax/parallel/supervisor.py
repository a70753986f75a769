"""The watcher of a trainer, one of several: it starts it, writes its log, and ends it when another process is missing.

A trainer cannot do that itself. When a process dies, the collectives of the others hang or fail, and where it was
process 0 jax's runtime ends them from C++ within milliseconds, with a page that names nobody. A watcher has no jax that
could fail: its word is the last one.

Each watcher tells how its trainer ended. Process 0's hears all of them, decides whose end it was that ended the run,
and tells that. When process 0 is missing, each of the others knows by itself.

A trainer that hangs says so before it ends (train/watchdog.py): then each watcher first has its own trainer, which
mostly waits for that one, write the stacks of its threads to its log.
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

from aimv2_jax.config import Config, ProcessesConfig, config_digest
from aimv2_jax.console import print_line
from aimv2_jax.errors import (
    EXIT_AGAIN,
    EXIT_FINISHED,
    EXIT_GUARD,
    EXIT_HUNG,
    EXIT_INTERRUPTED,
    EXIT_USER,
    UserError,
)
from aimv2_jax.growing import GrowingFile
from aimv2_jax.parallel.clusters import Place
from aimv2_jax.parallel.kills import MAX_KILLS, count_kill_within
from aimv2_jax.parallel.parent import signals_passed_on
from aimv2_jax.parallel.processes import trainer_environment
from aimv2_jax.parallel.roll_call import SECRET, Team, call_roll
from aimv2_jax.versions import installed_versions

_SILENT = 0.7  # Share of the heartbeat time-out after which a silent process is missing: the rest is for ending.
_BEATS = 10  # In a heartbeat time-out.
_CRASH_S = 3.0  # After a trainer crashed: maybe since another process is missing, whose watcher then tells so.
_UNWIND_S = 30.0  # After one ended for a reason that it tells: others may end for the same, and see a save through.
_WRITTEN_S = 5.0  # For what is yet to be written in the end.
_STACKS_S = 1.0  # For a trainer to write the stacks of its threads, where another one hangs.
_HUNG_S = 30.0  # For one that hangs to end by itself, when it has told so: more than it takes at most.
_LAST_WORDS_S = 1.0  # For pipes of an ended trainer: its data workers hold them, too, until they end.


@dataclasses.dataclass(frozen=True)
class End:
    """How a process ended.

    Args:
      code: its exit code, which becomes that of all.
      text: what it said of it.
      well: whether it came to its end together with all others: finished, or stopped on request.
      lost: why it is missing, if it could not say anything.
      hung: whether it is about to end because it hangs.
      killed: whether a signal ended its trainer that nobody sent to stop it.
    """

    index: int
    code: int
    text: str = ""
    well: bool = False
    lost: str | None = None
    hung: bool = False
    killed: bool = False


class Watcher:
    """Watches over the trainer of `place` until all is over.

    Args:
      team: from the roll call.
      log: where all that the trainer says goes; on process 0 it goes to this process' output, too.
      workdir: of the run, where process 0 counts trainers that were killed.
    """

    def __init__(self, place: Place, team: Team, settings: ProcessesConfig, log: GrowingFile, workdir: epath.PathLike):
        self._place, self._team, self._log, self._workdir = place, team, log, workdir
        self._timeout_s, self._barrier_s = settings.heartbeat_timeout_s, settings.barrier_timeout_s
        self._first = place.index == 0
        self._writer = _Writer()
        self._ends: dict[int, End] = {}
        self._verdict: End | None = None
        self._decide_s: float | None = None  # When it will be decided whose end it was.
        self._wait_s = 0.0  # Until when others are waited for, once this trainer has ended.
        self._told, self._words = b"", ""  # By the trainer, of its end.
        self._ended_s: float | None = None  # When it ended.
        self._beat_s = 0.0  # When the others were last told that this process lives.

    def run(self, command: Sequence[str]) -> int:
        """Starts the trainer by `command`; the exit code of this process, when it is over."""
        mine, its = socket.socketpair()
        # In a session of its own: Ctrl-C of a terminal comes to it through this process, once.
        self._trainer = subprocess.Popen(
            command,
            env=trainer_environment(self._place, its.fileno()),
            pass_fds=[its.fileno()],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,
        )
        its.close()
        out, err = self._trainer.stdout, self._trainer.stderr
        assert out is not None and err is not None
        with signals_passed_on(self._trainer), selectors.DefaultSelector() as self._selector:
            self._pipes = {
                mine: lambda: self._hear_trainer(mine),
                out: lambda: self._pass_on(out, sys.stdout),
                err: lambda: self._pass_on(err, sys.stderr),
            }
            for file, hear in self._pipes.items():
                os.set_blocking(file.fileno(), False)
                self._selector.register(file, selectors.EVENT_READ, hear)
            for index, link in self._team.links.items():
                self._selector.register(link, selectors.EVENT_READ, partial(self._hear_watcher, index))
            try:
                while not self._over():
                    self._turn()
                if any(end.hung for end in [*self._ends.values(), self._verdict] if end is not None):
                    self._take_stacks()
            finally:
                self._trainer.kill()
                self._trainer.wait()
            deadline_s = time.monotonic() + _LAST_WORDS_S
            while time.monotonic() < deadline_s and (self._pipes or self._unheard()):
                self._turn()
        for file in (mine, out, err, *self._team.links.values()):
            file.close()
        code = self._conclude()
        self._writer.close()
        return code

    def _take_stacks(self) -> None:
        """Some process hangs: waits until this one's trainer has written what all its threads do."""
        start_s = time.monotonic()
        if self._place.index not in self._ends and self._trainer.poll() is None:
            self._trainer.send_signal(signal.SIGUSR1)
        while self._trainer.poll() is None:
            # Where it has told of an end, it is itself one that hangs, and still writes.
            limit_s = _HUNG_S if self._place.index in self._ends else _STACKS_S
            if time.monotonic() > start_s + limit_s:
                break
            self._turn()

    def _unheard(self) -> bool:
        """Whether others may not yet have heard process 0's verdict: those that have, end."""
        return self._first and self._verdict is not None and not all(link.closed for link in self._team.links.values())

    def _turn(self) -> None:
        """Takes what has come, or waits a little for it; then looks at the clock."""
        for key, _ in self._selector.select(min(0.2, self._timeout_s / (2 * _BEATS))):
            if not key.data():
                self._selector.unregister(key.fileobj)
                self._pipes.pop(key.fileobj, None)
        now_s = time.monotonic()
        if now_s >= self._beat_s + self._timeout_s / _BEATS:
            self._beat_s = now_s
            self._send({"beat": True})
        for index, link in self._team.links.items():
            link.flush()
            silence_s = now_s - link.heard_s
            if index not in self._ends and silence_s > _SILENT * self._timeout_s:
                self._record(End(index, EXIT_AGAIN, lost=f"no sign of life for {silence_s:.0f} s"))
        if self._trainer.poll() is not None and self._place.index not in self._ends:
            self._ended_s = self._ended_s or now_s
            if not self._pipes or now_s > self._ended_s + _LAST_WORDS_S:
                self._end_of_trainer()
        if self._decide_s is not None and (now_s >= self._decide_s or len(self._ends) == self._place.count):
            self._decide(next(end for end in self._ends.values() if not end.well))

    def _send(self, message: Mapping[str, Any]) -> None:
        for link in self._team.links.values():
            link.send(message)

    def _over(self) -> bool:
        if self._verdict is not None:
            return True
        mine = self._ends.get(self._place.index)
        if mine is None:
            return False
        if time.monotonic() > self._wait_s:
            return True
        if not self._first:  # Process 0's verdict may have another code than its end.
            return mine.well or self._team.links[0].closed
        return len(self._ends) == self._place.count

    # --- what comes in: each returns False when nothing more will ----------------------------------------------------

    def _pass_on(self, pipe: BinaryIO, output: TextIO) -> bool:
        """What came through a pipe of the trainer: to the log, and on process 0 to its output."""
        try:
            data = os.read(pipe.fileno(), 1 << 16)
        except BlockingIOError:
            return True
        self._write(data, output if self._first else None)
        return bool(data)

    def _hear_trainer(self, channel: socket.socket) -> bool:
        """What the trainer tells of its end: process 0 says it to people only if it was nobody else's."""
        try:
            data = channel.recv(1 << 20)
        except BlockingIOError:
            return True
        except OSError:
            data = b""
        *lines, self._told = (self._told + data).split(b"\n")
        for line in lines:
            said = json.loads(line)
            self._words = said["text"].rstrip()
            self._write_line(self._words, to_people=False)
            if said.get("hung"):
                self._ended(End(self._place.index, said["code"], self._words, hung=True))
        return bool(data)

    def _hear_watcher(self, index: int) -> bool:
        link = self._team.links[index]
        for message in link.receive():
            if "end" in message:
                self._record(End(**message["end"]))
            if "verdict" in message:
                self._verdict = self._verdict or End(**message["verdict"])
        if link.closed and index not in self._ends:
            self._record(End(index, EXIT_AGAIN, lost="its connection broke"))
        return not link.closed

    # --- what goes out -----------------------------------------------------------------------------------------------

    def _write(self, data: bytes, output: TextIO | None, logged: bool = True) -> None:
        if logged and data:
            self._writer.put(self._log.write, data)
        if output is not None and data:
            self._writer.put(partial(_write, output), data)

    def _write_line(self, line: str, to_people: bool, logged: bool = True) -> None:
        self._write(line.encode(errors="replace") + b"\n", sys.stderr if to_people else None, logged)

    # --- whose end it was --------------------------------------------------------------------------------------------

    def _end_of_trainer(self) -> None:
        code, text = self._trainer.returncode, self._words
        well = code in (EXIT_FINISHED, EXIT_AGAIN) and not text  # A trainer that failed has told why, with 75, too.
        lost, killed = None, False
        if code < 0:
            number = signal.Signals(-code)
            text = f"its trainer was ended by {number.name}"
            killed = number not in (signal.SIGTERM, signal.SIGINT)  # Those came while it started or ended.
            # SIGABRT is mostly jax's, whose own watch found another process missing.
            lost = text if killed and number != signal.SIGABRT else None
            code = EXIT_INTERRUPTED if number == signal.SIGINT else EXIT_AGAIN
        self._ended(End(self._place.index, code, text, well, lost, killed=killed))

    def _ended(self, end: End) -> None:
        """Tells of the end of this process' trainer."""
        self._wait_s = time.monotonic() + (self._barrier_s if end.well else _UNWIND_S + self._timeout_s)
        self._record(end)  # First: process 0's verdict goes before its end, so that the others take its code.
        self._send({"end": dataclasses.asdict(end)})

    def _record(self, end: End) -> None:
        """Notes how a process ended; what follows, process 0 decides, or each where it is process 0 that is missing."""
        self._ends.setdefault(end.index, end)
        if (end.lost is not None or end.hung) and (self._first or end.index == 0):
            self._decide(end)
        elif not end.well and self._first:
            reason = end.code in (EXIT_USER, EXIT_GUARD, EXIT_AGAIN, EXIT_INTERRUPTED)
            deadline_s = time.monotonic() + (_UNWIND_S if reason else _CRASH_S)
            self._decide_s = min(deadline_s, self._decide_s or deadline_s)

    def _decide(self, end: End) -> None:
        self._decide_s = None
        if self._verdict is None:
            if end.killed and self._first:
                end = _after_kill(end, self._workdir)
            self._verdict = end
            if self._first:
                self._send({"verdict": dataclasses.asdict(end)})

    def _conclude(self) -> int:
        """Says the last words; the exit code."""
        mine = self._ends.get(self._place.index)
        verdict = self._verdict or mine
        assert verdict is not None
        host = self._team.hosts[verdict.index]
        if verdict.lost is not None:
            remedy = "The same command on all hosts goes on from the newest checkpoint"
            if verdict.code == EXIT_HUNG:
                remedy = "Look into the system's log of that host: SIGKILL is mostly its want of memory"
            line = f"error: process {verdict.index} on {host} is missing ({verdict.lost}); this ends the run. {remedy}"
            self._write_line(line, to_people=True)
            code = verdict.code
        elif mine is not None and mine.code == verdict.code and not mine.killed:  # Else maybe by this process.
            if mine.text:
                self._write_line(mine.text, to_people=self._first, logged=False)  # It is in the log.
            code = mine.code
        else:
            said = (verdict.text.splitlines() or ["see its log"])[-1]
            line = f"error: process {verdict.index} on {host} ended with code {verdict.code}: {said}"
            self._write_line(line, to_people=self._first)
            code = verdict.code
        return mine.code if mine is not None and mine.well else code


def _after_kill(end: End, workdir: epath.PathLike) -> End:
    """Counts a trainer that was killed: the run is started again, unless that has led nowhere."""
    kills = count_kill_within(workdir)
    if kills < MAX_KILLS:
        return dataclasses.replace(end, lost=end.text)
    lost = f"{end.text}, as trainers were {kills} times since the newest checkpoint"
    return dataclasses.replace(end, lost=lost, code=EXIT_HUNG)


class _Writer:
    """Writes in a thread: a terminal that is held up (Ctrl-S), or a disk, must not keep a watcher from watching."""

    def __init__(self) -> None:
        self._queue: queue.SimpleQueue[tuple[Callable[[bytes], Any], bytes] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="writer", daemon=True)
        self._thread.start()

    def put(self, write: Callable[[bytes], Any], data: bytes) -> None:
        self._queue.put((write, data))

    def close(self) -> None:
        """Returns when all is written, or cannot be."""
        self._queue.put(None)
        self._thread.join(_WRITTEN_S)

    def _run(self) -> None:
        while (item := self._queue.get()) is not None:
            write, data = item
            with contextlib.suppress(Exception):  # No room, or nobody reads: what ends a run is a lost checkpoint.
                write(data)


def _write(output: TextIO, data: bytes) -> None:
    output.flush()
    output.buffer.write(data)
    output.buffer.flush()


def supervise(place: Place, config: Config, workdir: epath.PathLike, arguments: Sequence[str]) -> int:
    """Trains as one of several processes, by `python -m aimv2_jax.main` with `arguments`; the exit code.

    Raises:
      UserError: if the others don't come, or were started otherwise.
    """
    facts = installed_versions() | {"workdir": os.fspath(workdir), "config": config_digest(config)}
    secret = os.environ.pop(SECRET, "").encode(errors="surrogateescape")  # Not for the trainer and its data workers.
    team = call_roll(place, socket.gethostname(), facts, config.processes.startup_timeout_s, secret)
    file = log_file(workdir, place.index)
    log, now = GrowingFile(file), time.strftime("%Y-%m-%d %H:%M:%S")
    with _asking_for(file):
        log.write(f"--- {now}: process {place.index} of {place.count} on {team.hosts[place.index]}\n".encode())
    code = Watcher(place, team, config.processes, log, workdir).run(
        [sys.executable, "-m", "aimv2_jax.main", *arguments]
    )
    try:
        with _asking_for(file):
            log.close()
    except UserError as error:  # The run has ended as it has.
        print_line(f"error: {error}", sys.stderr)
    return code


@contextlib.contextmanager
def _asking_for(file: epath.Path) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # OSError, and of a bucket TensorFlow's and fsspec's own kinds.
        said = getattr(error, "strerror", None) or str(error)
        remedy = "Give a --workdir that all hosts reach and can write to"
        raise UserError(f"the log {file} cannot be written", said, remedy) from error


def log_file(workdir: epath.PathLike, index: int) -> epath.Path:
    """Where process `index` of several logs."""
    return epath.Path(workdir) / "logs" / f"process_{index:05d}.log"
