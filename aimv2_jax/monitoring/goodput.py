"""Goodput computed from the event log (monitoring/events.py): starts, lost steps, and time by class. Pure.

The report has its own time axis, which is immune to clocks that are set back: within a start it follows the monotonic
clock of the process; between two starts the wall clock, from the last event of one to the beginning of the next, and
never below zero. Every second belongs to one class, so the classes add up to the total.

A step is productive if the current state of the run depends on it. It is lost if a later start or a rewind began before
it, so that it was done again. Steps of a killed start after its last event are unknown: they are only counted in
`max_unseen_steps`, and their time is `down`. So `progress` events should be more frequent than saves.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from aimv2_jax.errors import EXIT_BUG, EXIT_FINISHED, EXIT_GUARD, EXIT_INTERRUPTED, EXIT_RETRY, EXIT_USER
from aimv2_jax.monitoring.events import Event, EventKind, TimeClass

PRODUCTIVE, LOST, START_UP, DATA, EVALUATION, SAVING, DOWN, OTHER = CLASSES = tuple(TimeClass)
_STARTUP_KINDS = (
    EventKind.START,
    EventKind.RESTORE,
    EventKind.COMPILED,
    EventKind.DAMAGED,
    EventKind.SKIP,
    EventKind.DATA_CHANGED,
)
# Kinds of events whose `step` is completed.
_STEP_DONE_KINDS = (
    EventKind.PROGRESS,
    EventKind.SAVE,
    EventKind.EVALUATION,
    EventKind.PREEMPTION,
    EventKind.NONFINITE,
    EventKind.SPIKE,
    EventKind.CORRUPTION,
    EventKind.BAD_DATA,
    EventKind.STOP,
)
# Events that state their own duration, which counts until the next cumulative sums.
_TIMED_KINDS = {EventKind.EVALUATION: EVALUATION, EventKind.SAVE: SAVING}
_ENDINGS = {
    EXIT_FINISHED: "finished",
    EXIT_RETRY: "stopped",
    EXIT_BUG: "bug",
    EXIT_USER: "error",
    EXIT_GUARD: "guard",
    EXIT_INTERRUPTED: "interrupted",
}


@dataclasses.dataclass(frozen=True)
class Start:
    """One start of the trainer.

    Attributes:
      number: counted from 1.
      began_s: wall-clock time of its begin, seconds since 1970.
      begin_s: begin on the report's time axis.
      end_s: last event on the report's time axis.
      from_step: the step whose state it started from.
      to_step: the last step that it is known to have done.
      steps: number of steps done, including those before a rewind.
      lost: number of these that were done again.
      ended: "finished", "stopped" (on request), "guard", "error", "bug", "interrupted", "hung", "device failure",
        "killed"; or "" for a last start without an end, which may be running.
      code: exit code, if it was logged.
      why: reason of the end, as logged.
      down_s: time since the last event of the previous start.
      save_every: steps between its saves; 0 if not logged.
      seconds: time by class, without `down`.
      progress_every: largest number of steps between its `progress` events; 0 if there were none.
    """

    number: int
    began_s: float
    begin_s: float
    end_s: float
    from_step: int
    to_step: int
    steps: int
    lost: int
    ended: str
    code: int | None
    why: str
    down_s: float
    save_every: int
    seconds: Mapping[str, float]
    progress_every: int

    @property
    def failed(self) -> bool:
        """Whether it ended abnormally."""
        return self.ended not in ("", "finished", "stopped")


@dataclasses.dataclass(frozen=True)
class Span:
    """An interval on the report's time axis, with its seconds by class."""

    begin_s: float
    end_s: float
    seconds: Mapping[str, float]


@dataclasses.dataclass(frozen=True)
class ExpectedGoodput:
    """Goodput expected at the run's failures if each loses half a save interval, the mean. Fractions from 0 to 1.

    Attributes:
      steps: expected fraction of productive steps.
      time: expected goodput in time; restarts, which the save interval does not change, at their actual time.
      reached_steps: the run's own fraction of steps, without rewinds, over `steps`: above 1 if failures came soon after
        saves. Steps that may have been lost unseen count as lost.
      reached_time: the run's goodput over `time`, with unseen steps likewise.
    """

    steps: float
    time: float
    reached_steps: float
    reached_time: float


@dataclasses.dataclass(frozen=True)
class GoodputReport:
    """Goodput of a run: its starts, its time by class, and its productive and lost steps.

    Attributes:
      starts: in order.
      spans: of the whole time, in order and without gaps.
      seconds: time by class, for all of `CLASSES`.
      kept_steps: number of productive steps.
      lost_by_restarts: steps that a later start did again.
      lost_by_rewinds: steps that the same start did again.
      max_unseen_steps: bound on the steps that killed starts did and lost after their last events.
      failures: number of starts that did steps, ended abnormally, and were followed by another start.
      expected: None if nothing failed, or the save interval is unknown.
    """

    starts: Sequence[Start]
    spans: Sequence[Span]
    seconds: Mapping[str, float]
    kept_steps: int
    lost_by_restarts: int
    lost_by_rewinds: int
    max_unseen_steps: int
    failures: int
    expected: ExpectedGoodput | None

    @property
    def total_s(self) -> float:
        return sum(self.seconds.values())

    @property
    def goodput(self) -> float | None:
        """Productive time over all time."""
        return self.seconds[PRODUCTIVE] / self.total_s if self.total_s else None

    @property
    def steps_goodput(self) -> float | None:
        """Productive steps over all steps done."""
        done = self.kept_steps + self.lost_by_restarts + self.lost_by_rewinds
        return self.kept_steps / done if done else None


@dataclasses.dataclass
class _Segment:
    """Consecutive steps lo+1 … hi; `rewound`: begun by a rewind. Steps above `ceiling` were done again."""

    lo: int
    hi: int
    rewound: bool
    ceiling: int = 0

    def lost(self, lo: int, hi: int) -> int:
        """Number of the steps lo+1 … hi that were done again."""
        return hi - max(lo, min(hi, self.ceiling))


class _Piece(NamedTuple):
    """The steps lo+1 … hi of a segment."""

    segment: _Segment
    lo: int
    hi: int


class _Interval(NamedTuple):
    """Time between two `progress` events: clock, pieces done, their seconds, and other seconds by class."""

    begin_s: float
    end_s: float
    pieces: Sequence[_Piece]
    step_s: float
    other_s: Mapping[str, float]


def compute_goodput(events: Sequence[Event]) -> GoodputReport:
    """Computes the goodput report of all starts in `events`, which may be empty."""
    runs: dict[str, list[Event]] = {}
    for event in events:
        runs.setdefault(event.run, []).append(event)
    parsed = [_read_start(run) for run in runs.values()]
    segments = [segment for start_segments, _ in parsed for segment in start_segments]
    lost_by_restarts, lost_by_rewinds = _find_lost(segments)
    starts, spans = [], []
    end_s, previous = 0.0, None
    for number, (run, (own, intervals)) in enumerate(zip(runs.values(), parsed), start=1):
        first, last_clock_s = run[0], max(event.clock_s for event in run)
        began_s = first.time_s - first.clock_s
        down_s = 0.0 if previous is None else max(0.0, began_s - previous.time_s)
        if down_s:
            spans.append(Span(end_s, end_s + down_s, {DOWN: down_s}))
        begin_s = end_s + down_s
        own_spans = [_span(interval, begin_s) for interval in intervals if interval.end_s > interval.begin_s]
        spans += own_spans
        end_s, previous = begin_s + last_clock_s, run[-1]
        ended, code, why = _ending(run, last=number == len(runs))
        progress_steps = [run[0].step] + [event.step for event in run if event.kind == EventKind.PROGRESS]
        starts.append(
            Start(
                number=number,
                began_s=began_s,
                begin_s=begin_s,
                end_s=end_s,
                from_step=own[0].lo,
                to_step=own[-1].hi,
                steps=sum(segment.hi - segment.lo for segment in own),
                lost=sum(segment.lost(segment.lo, segment.hi) for segment in own),
                ended=ended,
                code=code,
                why=why,
                down_s=down_s,
                save_every=first.values.get("save_every") or 0,
                seconds=_sums(own_spans),
                progress_every=max((b - a for a, b in itertools.pairwise(progress_steps)), default=0),
            )
        )
    seconds = _sums(spans)
    kept = sum(segment.ceiling - segment.lo for segment in segments)
    failed = [start for start in starts[:-1] if start.failed and start.steps]
    unseen = sum(max(0, start.progress_every - 1) for start in failed if start.ended in ("killed", "hung"))
    lost_share = lost_by_restarts / max(1, lost_by_restarts + lost_by_rewinds)
    expected = _expected_goodput(failed, seconds, kept, lost_by_restarts, unseen, seconds[LOST] * lost_share)
    return GoodputReport(starts, spans, seconds, kept, lost_by_restarts, lost_by_rewinds, unseen, len(failed), expected)


def _read_start(run: Sequence[Event]) -> tuple[list[_Segment], list[_Interval]]:
    """The steps of a start, and its time from the start of the process to its last event."""
    starting = list(itertools.takewhile(lambda event: event.kind in _STARTUP_KINDS, run))
    rest = run[len(starting) :]
    last_s = max(event.clock_s for event in run)
    segments = [_Segment(run[0].step, run[0].step, rewound=False)]
    pieces: list[_Piece] = []
    mark_s = max((event.clock_s for event in starting), default=0.0) if rest else last_s
    intervals = [_Interval(0.0, mark_s, (), 0.0, {START_UP: mark_s})] if mark_s else []
    sums = dict.fromkeys(("step_s", "data_s", "evaluation_s", "saving_s"), 0.0)
    since_sums = {EVALUATION: 0.0, SAVING: 0.0}  # Durations logged by single events since the last sums.

    def mark_done(step: int) -> None:
        segment = segments[-1]
        if step > segment.hi:
            pieces.append(_Piece(segment, segment.hi, step))
            segment.hi = step

    for event in rest:
        values = event.values
        if event.kind in _STEP_DONE_KINDS:
            mark_done(event.step)
        if event.kind == EventKind.REWIND:
            mark_done(values["from_step"])
            segments.append(_Segment(values["to_step"], values["to_step"], rewound=True))
        elif event.kind == EventKind.PROGRESS:
            current = {name: max(seconds, values.get(name) or 0.0) for name, seconds in sums.items()}
            other_s = {kind: current[f"{kind}_s"] - sums[f"{kind}_s"] for kind in (DATA, EVALUATION, SAVING)}
            step_s = current["step_s"] - sums["step_s"]
            intervals.append(_Interval(mark_s, event.clock_s, tuple(pieces), step_s, other_s))
            sums = current
            pieces.clear()
            mark_s = event.clock_s
            since_sums = dict.fromkeys(since_sums, 0.0)
        elif event.kind in _TIMED_KINDS:
            since_sums[_TIMED_KINDS[event.kind]] += values.get("seconds") or 0.0
    # After the last sums: single events give their durations, steps take their previous mean, the rest is `other`.
    remaining_s = max(0.0, last_s - mark_s - sum(since_sums.values()))
    known = sum(piece.hi - piece.lo for interval in intervals for piece in interval.pieces)
    trailing = sum(piece.hi - piece.lo for piece in pieces)
    step_s = min(remaining_s, sums["step_s"] / known * trailing) if known else remaining_s
    intervals.append(_Interval(mark_s, last_s, tuple(pieces), step_s, since_sums))
    return segments, intervals


def _find_lost(segments: Sequence[_Segment]) -> tuple[int, int]:
    """Sets the ceiling of each segment; returns the steps lost by restarts, and by rewinds."""
    lost = {False: 0, True: 0}
    kept: list[_Segment] = []  # The segments so far with steps that count, in the order of these steps.
    for segment in segments:
        while kept and kept[-1].ceiling > segment.lo:
            last = kept[-1]
            ceiling = max(last.lo, segment.lo)
            lost[segment.rewound] += last.ceiling - ceiling
            last.ceiling = ceiling
            if ceiling == last.lo:
                kept.pop()
        segment.ceiling = segment.hi
        kept.append(segment)
    return lost[False], lost[True]


def _span(interval: _Interval, begin_s: float) -> Span:
    """The interval on the report's time axis, with its seconds by class."""
    length_s = interval.end_s - interval.begin_s
    steps = sum(piece.hi - piece.lo for piece in interval.pieces)
    seconds = dict(interval.other_s)
    if steps:
        lost = sum(segment.lost(lo, hi) for segment, lo, hi in interval.pieces)
        seconds[LOST] = interval.step_s * lost / steps
        seconds[PRODUCTIVE] = interval.step_s * (steps - lost) / steps
    total_s = sum(seconds.values())
    if total_s > length_s:  # The clock of an event is read slightly after its sums.
        seconds = {kind: value * length_s / total_s for kind, value in seconds.items()}
    else:
        seconds[OTHER] = length_s - total_s
    return Span(begin_s + interval.begin_s, begin_s + interval.end_s, seconds)


def _sums(spans: Sequence[Span]) -> dict[str, float]:
    return {kind: sum(span.seconds.get(kind, 0.0) for span in spans) for kind in CLASSES}


def _ending(run: Sequence[Event], last: bool) -> tuple[str, int | None, str]:
    """How a start ended, its exit code, and the reason."""
    stop = next((event for event in reversed(run) if event.kind == EventKind.STOP), None)
    hang = next((event for event in reversed(run) if event.kind == EventKind.HANG), None)
    code = None if stop is None else stop.values.get("code")
    why = "" if stop is None else str(stop.values.get("why") or "")
    if hang is not None and run[-1] in (hang, stop):
        return "hung", code, why or f"waiting for {hang.values.get('what')}"
    if any(event.kind == EventKind.DEVICE_FAILURE for event in run[-2:]):
        return "device failure", code, why
    if stop is None:
        return "" if last else "killed", None, ""
    return _ENDINGS.get(code, "error"), code, why


def _expected_goodput(
    failed: Sequence[Start], seconds: Mapping[str, float], kept: int, lost: int, unseen: int, lost_s: float
) -> ExpectedGoodput | None:
    """Expected goodput, given `kept` steps, `lost` steps of `lost_s`, and at most `unseen` steps within `down`."""
    if not failed or not kept or not seconds[PRODUCTIVE] or not all(start.save_every for start in failed):
        return None
    mean_lost = sum(start.save_every / 2 for start in failed)
    steps = kept / (kept + mean_lost)
    step_s, total_s = seconds[PRODUCTIVE] / kept, sum(seconds.values())
    without_s = total_s - lost_s - min(seconds[DOWN], unseen * step_s)
    time = seconds[PRODUCTIVE] / (without_s + mean_lost * step_s)
    return ExpectedGoodput(steps, time, kept / (kept + lost + unseen) / steps, seconds[PRODUCTIVE] / total_s / time)
