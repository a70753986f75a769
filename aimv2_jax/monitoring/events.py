"""Event log of a run, `WORKDIR/events.jsonl`, and time accounting.

Unlike the metrics file it is append-only. A resume cuts nothing: a killed start and its lost steps stay recorded.
`monitoring/goodput.py` computes the goodput report from it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import enum
import json
import os
import secrets
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
from etils import epath

from aimv2_jax.console import print_line
from aimv2_jax.storage.append import AppendFile, to_json, writing
from aimv2_jax.storage.files import is_remote, read_bytes
from aimv2_jax.untrusted import as_int, as_number, parse_json_object, printable

_FILE = "events.jsonl"
_TAIL_BYTES = 1 << 16


class EventKind(enum.StrEnum):
    """Kinds of events, with their fields.

    All events also have kind, step, time, clock and run. `step` is the last completed step, unless a comment below
    states another.
    """

    fields: tuple[str, ...]

    def __new__(cls, value: str, fields: tuple[str, ...]) -> EventKind:
        kind = str.__new__(cls, value)
        kind._value_ = value
        kind.fields = fields
        return kind

    # A trainer starts from the state after `step`. config: digest of the resolved config; steps: the last step.
    START = "start", ("processes", "devices", "device_kind", "config", "steps", "save_every", "versions")
    # The train step was compiled for one batch shape.
    COMPILED = "compiled", ("seconds",)
    # The state after `step` was read from a checkpoint.
    RESTORE = "restore", ("seconds",)
    # The checkpoint of `step` is damaged and was set aside.
    DAMAGED = "damaged", ("files", "moved_to")
    # A save of the state after `step` started; seconds: time blocked on it.
    SAVE = "save", ("seconds",)
    # The save of `step` failed.
    SAVE_FAILED = "save_failed", ("why",)
    EVALUATION = "evaluation", ("seconds", "eval_loss")
    # Time by class since the first step of this start: cumulative, so that a kill loses only the last interval.
    PROGRESS = "progress", ("step_s", "data_s", "evaluation_s", "saving_s")
    # A stop was requested; `step` is saved.
    PREEMPTION = "preemption", ()
    # The update of `step` was skipped; file: input of a replay.
    NONFINITE = "nonfinite", ("loss", "grad_norm", "file")
    # values: {"loss": …, "grad_norm": …} with their expected values; action: of the config.
    SPIKE = "spike", ("values", "action")
    # Batches [a, b) are skipped.
    SKIP = "skip", ("a", "b", "why")
    # Rollback to the state after `to_step`, skipping batches [a, b).
    REWIND = "rewind", ("from_step", "to_step", "a", "b")
    # Data or tokenizer changed after `step`, allowed by --accept_data.
    DATA_CHANGED = "data_changed", ("what",)
    # {reason: records} that could not be used since the last such event.
    BAD_DATA = "bad_data", ("counts",)
    # Timeout of `what` in the unfinished `step`; file: all stacks.
    HANG = "hang", ("what", "file")
    # A device, or the network between devices, failed in the step after `step`; file: the traceback.
    DEVICE_FAILURE = "device_failure", ("status", "file")
    # A loader worker died or stalled; at: its shard and record.
    WORKER_RESTARTED = "worker_restarted", ("what", "at")
    # Recomputing `step` gave different bits.
    CORRUPTION = "corruption", ("leaf", "device", "host")
    # Any exit that the trainer handles; a kill writes no event.
    STOP = "stop", ("code", "why")


class TimeClass(enum.StrEnum):
    """Classes of a run's time; each second belongs to one of them."""

    PRODUCTIVE = "productive"  # Steps that the current state depends on.
    LOST = "lost"  # Steps that were done again.
    START_UP = "start-up"  # From the start of a process to its first step: imports, compilation, restoring.
    DATA = "data"  # Waiting for batches.
    EVALUATION = "evaluation"
    SAVING = "saving"  # Steps blocked on saves.
    DOWN = "down"  # Between the last event of a start and the next start.
    OTHER = "other"  # Everything else, such as a hang.


# Numeric fields, which are null if not finite. Integers are steps, batches and exit codes.
_INTEGERS = frozenset({"steps", "save_every", "from_step", "to_step", "a", "b", "code"})
_FLOATS = frozenset({"seconds", "step_s", "data_s", "evaluation_s", "saving_s", "eval_loss"})
_MAX_STEP = 2**53
_MAX_TIME_S = 253_402_300_799.0  # The end of the year 9999, the limit of datetime.


@dataclasses.dataclass(frozen=True)
class Event:
    """A line of the event log.

    Attributes:
      kind: value of an `EventKind`, of this version or a newer one.
      step: of the run.
      time_s: wall-clock time, seconds since 1970.
      clock_s: monotonic seconds since the start of the process that wrote it.
      run: random id of the start; every start of a trainer has its own.
      values: the fields of its kind.
    """

    kind: str
    step: int
    time_s: float
    clock_s: float
    run: str
    values: Mapping[str, Any]


class EventLog:
    """Writes the event log on process 0; does nothing on other processes.

    A line is on the disk when `write` returns, and survives a kill -9 (in a bucket: some seconds later). Threads may
    write concurrently after the first line: appends of the operating system do not interleave.

    Args:
      workdir: the run's folder.
      age_s: seconds that this process has already spent on the run, such as on imports; see `process_age_s`.
      clock: monotonic seconds.
      wall: seconds since 1970.
    """

    def __init__(
        self,
        workdir: epath.PathLike,
        age_s: float = 0.0,
        clock: Callable[[], float] = time.monotonic,
        wall: Callable[[], float] = time.time,
    ):
        self._active = jax.process_index() == 0
        self._path = epath.Path(workdir) / _FILE
        self._file = AppendFile(self._path)
        self._clock = clock
        self._wall = wall
        self._begin_s = clock() - age_s
        self._run = secrets.token_hex(4)
        self._ends_with_newline = False

    def write(self, kind: EventKind, step: int, **values: Any) -> None:
        """Appends an event; `values` are the fields of `kind`. A number that isn't finite becomes null.

        Raises:
          UserError: when it cannot be written.
        """
        assert set(values) == set(EventKind(kind).fields), (kind, sorted(values))
        if not self._active:
            return
        head = {"kind": kind, "step": int(step), "time": round(self._wall(), 3)}
        head |= {"clock": round(self._clock() - self._begin_s, 3), "run": self._run}
        line = json.dumps(head | to_json(values), allow_nan=False).encode() + b"\n"
        with writing(self._path):
            if not self._ends_with_newline and not _ends_with_newline(self._path):
                line = b"\n" + line  # Separates it from a partial line of a killed process or a full disk.
            self._ends_with_newline = False
            self._file.write(line)
            self._ends_with_newline = True

    def ahead_s(self) -> float:
        """Seconds by which the last event is ahead of the wall clock; above 0 if the clock was set back."""
        if not self._active:
            return 0.0
        with writing(self._path):
            lines = _tail(self._path)
        last = next((event for text in reversed(lines) if (event := _event(text)) is not None), None)
        return 0.0 if last is None else max(0.0, last.time_s - self._wall())

    def last(self, kind: EventKind) -> Event | None:
        """The last event of its kind; None if there is none, or this is not process 0."""
        with writing(self._path):
            events = read_events(self._path.parent) if self._active else []
        return next((event for event in reversed(events) if event.kind == kind), None)

    def flush(self) -> None:
        """Waits until all events are in the workdir, which may be in a bucket."""
        if self._active:
            with writing(self._path):
                self._file.flush()

    def close(self) -> None:
        """Flushes and closes the file."""
        if self._active:
            with writing(self._path):
                self._file.close()

    def __enter__(self) -> EventLog:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


class TimeAccounting:
    """Time of a start by class since its first step, for `EventKind.PROGRESS`; everything else counts as step time.

        with time_accounting.on(TimeClass.DATA):
            batch = next(batches)
        ...
        events.write(EventKind.PROGRESS, step, **time_accounting.seconds())

    Args:
      clock: monotonic seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic):
        self._clock = clock
        self.restart()

    def restart(self) -> None:
        """Begins at zero; called before the first step."""
        self._begin_s = self._clock()
        self._seconds = {TimeClass.DATA: 0.0, TimeClass.EVALUATION: 0.0, TimeClass.SAVING: 0.0}

    @contextlib.contextmanager
    def on(self, what: TimeClass) -> Iterator[None]:
        """Counts the time inside as DATA, EVALUATION or SAVING. Contexts must not be nested."""
        start_s = self._clock()
        try:
            yield
        finally:
            self._seconds[what] += self._clock() - start_s

    def seconds(self) -> dict[str, float]:
        """Cumulative seconds, as the fields of `EventKind.PROGRESS`."""
        step_s = self._clock() - self._begin_s - sum(self._seconds.values())
        sums = {"step_s": step_s} | {f"{what}_s": seconds for what, seconds in self._seconds.items()}
        return {name: round(value, 3) for name, value in sums.items()}


def process_age_s() -> float:
    """Seconds since this process was started, imports included; 0 if the system does not provide it."""
    try:
        fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
        started_s = int(fields[19]) / os.sysconf("SC_CLK_TCK")  # "starttime", in ticks since boot.
        return max(0.0, time.clock_gettime(time.CLOCK_BOOTTIME) - started_s)
    except (OSError, AttributeError, IndexError, ValueError):  # Available on Linux only.
        return 0.0


def read_events(workdir: epath.PathLike) -> list[Event]:
    """Reads all events of a run in file order; empty if there is no event log.

    A partial line, left by a kill or a full disk, is skipped silently. Any other invalid line is skipped and logged to
    stderr.
    """
    path = epath.Path(workdir) / _FILE
    try:
        data = read_bytes(path)
    except FileNotFoundError:
        return []
    events = []
    for number, text in enumerate(data.split(b"\n"), start=1):
        event = _event(text)
        if event is not None:
            events.append(event)
        elif not _is_partial(text.decode(errors="replace")):
            shown = printable(text[:80].decode(errors="replace"))
            print_line(f"{path}:{number} is skipped: it is not an event ({shown})", sys.stderr)
    return events


def _event(text: bytes) -> Event | None:
    try:
        values = parse_json_object(text)
        kind, step, run = (values.pop(name) for name in ("kind", "step", "run"))
        time_s, clock_s = (as_number(values.pop(name), _MAX_TIME_S) for name in ("time", "clock"))
        as_int(step, 0, _MAX_STEP)
        for name in values.keys() & _INTEGERS:
            if values[name] is not None:
                as_int(values[name], -_MAX_STEP, _MAX_STEP)
        for name in values.keys() & _FLOATS:
            if values[name] is not None:
                as_number(values[name])
    except (ValueError, KeyError):
        return None
    known = isinstance(kind, str) and isinstance(run, str) and time_s >= 0
    known = known and (kind != EventKind.REWIND or None not in (values.get("from_step"), values.get("to_step")))
    return Event(kind, step, time_s, clock_s, run, values) if known else None


def _is_partial(text: str) -> bool:
    """Whether `text` is a prefix of an event line, possibly empty."""
    text = text.rstrip("\0")  # Some file systems leave zeros when the machine crashes.
    head = '{"kind": '
    if not text.startswith(head[: len(text)]):
        return False
    open_brackets, in_string, escaped = 0, False, False
    for char in text:
        if in_string:
            in_string = escaped or char != '"'
            escaped = char == "\\" and not escaped
        elif char == '"':
            in_string = True
        else:
            open_brackets += (char in "{[") - (char in "}]")
    return open_brackets > 0 or not text


def _ends_with_newline(path: epath.Path) -> bool:
    """Whether a file is absent, empty, or ends with a newline."""
    return _tail(path)[-1] == b""


def _tail(path: epath.Path) -> list[bytes]:
    """The last lines of a file; the first may be cut, and the last is empty if the file is absent or ends with one."""
    try:
        if is_remote(path):
            return read_bytes(path).split(b"\n")
        with Path(path).open("rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - _TAIL_BYTES))
            return file.read().split(b"\n")
    except FileNotFoundError:
        return [b""]
