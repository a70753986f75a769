"""The books of a run: `WORKDIR/events.jsonl`, a line whenever something happened that is no number of a step.

Unlike the metrics, it is only ever added to. A resume cuts nothing away: a start that was killed, and the steps that
went with it, stay told. `train/goodput.py` makes the story of it.
"""

from __future__ import annotations

import contextlib
import dataclasses
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
from aimv2_jax.files import is_remote
from aimv2_jax.growing import GrowingFile, plain, writing
from aimv2_jax.untrusted import as_int, as_number, parse_json_object, printable

_FILE = "events.jsonl"
_TAIL_BYTES = 1 << 16

# The fields of each kind, beside those that all have: kind, step, time, clock, run. `step` is the last one that was
# done when it happened; where a line below says so, it is another.
KINDS: Mapping[str, tuple[str, ...]] = {
    # A trainer begins, from the state after `step`. config: digest of the resolved one; steps: where the run ends.
    "start": ("processes", "devices", "device_kind", "config", "steps", "save_every", "versions"),
    "compiled": ("seconds",),  # The train step, of one shape of batches.
    "restore": ("seconds",),  # The state after `step` was read from a checkpoint.
    "damaged": ("files", "moved_to"),  # The checkpoint of `step` is not intact; it was set aside.
    "save": ("seconds",),  # The state after `step` is being saved; steps waited so long for that.
    "save_failed": ("why",),  # The save of `step` came to nothing.
    "evaluation": ("seconds", "eval_loss"),
    # Where the time of this start went since its first step was begun: sums, so that a kill loses only the last bit.
    "progress": ("step_s", "data_s", "evaluation_s", "saving_s"),
    "preemption": (),  # Asked to stop; `step` is saved.
    "nonfinite": ("loss", "grad_norm", "file"),  # `step` has changed nothing; file: what a replay needs.
    "spike": ("values", "action"),  # values: {"loss": …, "grad_norm": …}, with what was expected; action: as config.
    "skip": ("a", "b", "why"),  # Batches [a, b) are not trained on.
    "rewind": ("from_step", "to_step", "a", "b"),  # Back to the state after `to_step`, without the batches [a, b).
    "data_changed": ("what",),  # From `step` on with other data or another tokenizer, as --accept_data allows.
    "bad_data": ("counts",),  # {reason: records} that could not be used since the last such line.
    "hang": ("what", "file"),  # A time-out: `what` was waited for, in `step`, which is not done; file: all stacks.
    # A device, or the network between devices, failed in the step after `step`; file: the traceback.
    "device_failure": ("status", "file"),
    "worker_restarted": ("what", "at"),  # A loader's worker died or stalled; at: its shard and record.
    "corruption": ("leaf", "device", "host"),  # `step` computed twice did not give the same bits.
    "stop": ("code", "why"),  # In good order, by a guard, or by an error that was told; a kill leaves none.
}


# Fields that are numbers, or null where they were not finite. Whole ones among them are steps, batches and codes.
_WHOLE = frozenset({"steps", "save_every", "from_step", "to_step", "a", "b", "code"})
_NUMBERS = frozenset({"seconds", "step_s", "data_s", "evaluation_s", "saving_s", "eval_loss"})
_MAX_STEP = 2**53
_MAX_TIME_S = 253_402_300_799.0  # The end of the year 9999, the last that Python's dates know.


@dataclasses.dataclass(frozen=True)
class Event:
    """A line of the books.

    Attributes:
      kind: one of `KINDS`, or of a newer version's.
      step: of the run.
      time_s: what the wall clock showed, seconds since 1970.
      clock_s: seconds since the start of the process that wrote it, never going back.
      run: which start it was: every start of a trainer has another.
      values: the fields of its kind.
    """

    kind: str
    step: int
    time_s: float
    clock_s: float
    run: str
    values: Mapping[str, Any]


class Events:
    """Writes the books; on every process but the first it writes nothing.

    A line is on the disk when `write` returns, and outlives a kill -9 (in a bucket: some seconds later). Threads may
    write at the same time once the first line is written: the system keeps lines apart.

    Args:
      workdir: the run's folder.
      age_s: seconds that this process has spent on the run before, such as imports: see `process_age_s`.
      clock: seconds from any start, never going back.
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
        self._file = GrowingFile(self._path)
        self._clock, self._wall = clock, wall
        self._begin_s = clock() - age_s
        self._run = secrets.token_hex(4)
        self._whole = False  # Whether what is there ends with the end of a line.

    def write(self, kind: str, step: int, **values: Any) -> None:
        """Adds a line; `values` are exactly the fields of `kind` in `KINDS`. A number that isn't finite becomes null.

        Raises:
          UserError: when it cannot be written.
        """
        assert set(values) == set(KINDS[kind]), (kind, sorted(values))
        if not self._active:
            return
        head = {"kind": kind, "step": int(step), "time": round(self._wall(), 3)}
        head |= {"clock": round(self._clock() - self._begin_s, 3), "run": self._run}
        line = json.dumps(head | plain(values), allow_nan=False).encode() + b"\n"
        with writing(self._path):
            if not self._whole and not _ends_whole(self._path):
                line = b"\n" + line  # So that the half line of a killed process, or of a full disk, stays alone.
            self._whole = False
            self._file.write(line)
            self._whole = True

    def ahead_s(self) -> float:
        """Seconds by which the last line is ahead of the wall clock, which then was set back; 0: as it should be."""
        if not self._active:
            return 0.0
        with writing(self._path):
            lines = _tail(self._path) if self._path.exists() else []
        last = next((event for text in reversed(lines) if (event := _event(text)) is not None), None)
        return 0.0 if last is None else max(0.0, last.time_s - self._wall())

    def last(self, kind: str) -> Event | None:
        """The last one of its kind; None where there is none, or this process writes no books."""
        with writing(self._path):
            events = read_events(self._path.parent) if self._active else []
        return next((event for event in reversed(events) if event.kind == kind), None)

    def flush(self) -> None:
        """Returns when all of it is in the workdir, which may be in a bucket."""
        if self._active:
            with writing(self._path):
                self._file.flush()

    def close(self) -> None:
        """Flushes and closes the file."""
        if self._active:
            with writing(self._path):
                self._file.close()

    def __enter__(self) -> Events:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


class Spending:
    """Where the time of a start goes from its first step on, for `progress`: what is nothing else is steps.

        spending = Spending()
        with spending.on("data"):
            batch = next(batches)
        ...
        events.write("progress", step, **spending.seconds())

    Args:
      clock: seconds from any start, never going back.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic):
        self._clock = clock
        self._begin_s = clock()
        self._spent = {"data": 0.0, "evaluation": 0.0, "saving": 0.0}

    @contextlib.contextmanager
    def on(self, what: str) -> Iterator[None]:
        """Counts the time inside as "data", "evaluation" or "saving"; one is not to be used inside another."""
        start_s = self._clock()
        try:
            yield
        finally:
            self._spent[what] += self._clock() - start_s

    def seconds(self) -> dict[str, float]:
        """The sums so far, as the fields of `progress`."""
        step_s = self._clock() - self._begin_s - sum(self._spent.values())
        sums = {"step_s": step_s} | {f"{what}_s": spent for what, spent in self._spent.items()}
        return {name: round(value, 3) for name, value in sums.items()}


def process_age_s() -> float:
    """Seconds since this process was started, imports included; 0 where the system does not tell."""
    try:
        fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
        started_s = int(fields[19]) / os.sysconf("SC_CLK_TCK")  # "starttime", in ticks since the machine's boot.
        return max(0.0, time.clock_gettime(time.CLOCK_BOOTTIME) - started_s)
    except (OSError, AttributeError, IndexError, ValueError):  # Linux alone has all of it.
        return 0.0


def has_events(workdir: epath.PathLike) -> bool:
    """Whether the folder has books; runs of older versions have none."""
    return (epath.Path(workdir) / _FILE).exists()


def read_events(workdir: epath.PathLike) -> list[Event]:
    """All events of a run, as they were written; none where there are no books.

    Half a line, which a kill or a full disk left, is passed over. A line that is something else is left out, too, and
    named on the error output.
    """
    path = epath.Path(workdir) / _FILE
    if not path.exists():
        return []
    events = []
    for number, text in enumerate(path.read_bytes().split(b"\n"), start=1):
        event = _event(text)
        if event is not None:
            events.append(event)
        elif not _is_half(text.decode(errors="replace")):
            shown = printable(text[:80].decode(errors="replace"))
            print_line(f"{path}:{number} is left out: it is no event ({shown})", sys.stderr)
    return events


def _event(text: bytes) -> Event | None:
    try:
        values = parse_json_object(text)
        kind, step, run = (values.pop(name) for name in ("kind", "step", "run"))
        time_s, clock_s = (as_number(values.pop(name), _MAX_TIME_S) for name in ("time", "clock"))
        as_int(step, 0, _MAX_STEP)
        for name in values.keys() & _WHOLE:
            if values[name] is not None:
                as_int(values[name], -_MAX_STEP, _MAX_STEP)
        for name in values.keys() & _NUMBERS:
            if values[name] is not None:
                as_number(values[name])
    except (ValueError, KeyError):
        return None
    known = isinstance(kind, str) and isinstance(run, str) and time_s >= 0
    known = known and (kind != "rewind" or None not in (values.get("from_step"), values.get("to_step")))
    return Event(kind, step, time_s, clock_s, run, values) if known else None


def _is_half(text: str) -> bool:
    """Whether `text` is what a line of ours may be when it breaks off, which may be before its first letter."""
    text = text.rstrip("\0")  # What some file systems leave of a line when the machine dies.
    head = '{"kind": '
    if not text.startswith(head[: len(text)]):
        return False
    open_brackets, in_string, escaped = 0, False, False
    for letter in text:
        if in_string:
            in_string = escaped or letter != '"'
            escaped = letter == "\\" and not escaped
        elif letter == '"':
            in_string = True
        else:
            open_brackets += (letter in "{[") - (letter in "}]")
    return open_brackets > 0 or not text


def _ends_whole(path: epath.Path) -> bool:
    """Whether a file is absent, empty, or ends with the end of a line."""
    return not path.exists() or _tail(path)[-1] == b""


def _tail(path: epath.Path) -> list[bytes]:
    """The last lines of a file, the first of them perhaps cut; the very last one is empty where no line is open."""
    if is_remote(path):
        return path.read_bytes().split(b"\n")
    with Path(path).open("rb") as file:
        file.seek(max(0, file.seek(0, os.SEEK_END) - _TAIL_BYTES))
        return file.read().split(b"\n")
