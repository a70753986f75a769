"""The story that the books tell (train/events.py): starts, steps that were lost, and where the time went. Pure.

Time is counted on an axis of its own, which no clock that is set back can bend: within a start by the clock of its
process; between two starts by the wall clock, from the last sign of the one to the beginning of the other, and never
below zero. Every second of it is of one class, so that the classes add up to the whole.

A step counts where the run as it now stands is built on it. It is lost where a later start, or a rewind, began at a
step before it, so that it was done again. What a killed start did after its last sign is not known: its steps are in no
count but that of what may be unseen, and their time is `down`. So signs (`progress`) should come more often than saves.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping, Sequence

from aimv2_jax.errors import EXIT_AGAIN, EXIT_BUG, EXIT_FINISHED, EXIT_GUARD, EXIT_INTERRUPTED, EXIT_USER
from aimv2_jax.train.events import Event

PRODUCTIVE, LOST, START_UP, DATA, EVALUATION, SAVING, DOWN, OTHER = CLASSES = (
    "productive",  # Steps that count.
    "lost",  # Steps that were done again.
    "start-up",  # From a process' start until its steps begin: imports, compilation, restoring.
    "data",  # Waiting for batches.
    "evaluation",
    "saving",  # What steps waited for saves.
    "down",  # Between the last sign of a start and the next start.
    "other",  # What none of these explains, such as a hang.
)
_SPENT = {"data_s": DATA, "evaluation_s": EVALUATION, "saving_s": SAVING}
_STARTING = ("start", "restore", "compiled", "damaged", "skip", "data_changed")
_ENDINGS = {
    EXIT_FINISHED: "finished",
    EXIT_AGAIN: "stopped",
    EXIT_BUG: "bug",
    EXIT_USER: "error",
    EXIT_GUARD: "guard",
    EXIT_INTERRUPTED: "interrupted",
}
# Kinds whose `step` is done.
_DONE = ("progress", "save", "evaluation", "preemption", "nonfinite", "spike", "corruption", "bad_data", "stop")


@dataclasses.dataclass(frozen=True)
class Start:
    """One start of the trainer.

    Attributes:
      number: counted from 1.
      began_s: by the wall clock of then, seconds since 1970.
      begin_s: on the story's own axis, as `end_s`, its last sign.
      from_step: whose state it began with.
      to_step: the last step it is known to have done.
      steps: how many that were, those of before a rewind included.
      lost: how many of them were done again.
      ended: "finished", "stopped" (on request), "guard", "error", "bug", "interrupted", "hung", "device failure",
        "killed"; or "" for the last one without an end, which may be at work.
      code: of its exit, where it told one.
      why: it ended, in its own words.
      down_s: before it, since the last sign of the start before.
      save_every: steps between its saves; 0 where it did not say.
      seconds: by class, `down` apart.
      seen_every: steps between its signs, at most; 0 where there were none.
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
    seen_every: int

    @property
    def failed(self) -> bool:
        """Whether it ended otherwise than in good order."""
        return self.ended not in ("", "finished", "stopped")


@dataclasses.dataclass(frozen=True)
class Span:
    """A stretch of the axis, and how its seconds split into classes."""

    begin_s: float
    end_s: float
    seconds: Mapping[str, float]


@dataclasses.dataclass(frozen=True)
class Allowed:
    """What failures cost at the mean: half a save interval each. Shares from 0 to 1.

    Attributes:
      steps: of all steps done, those that would count.
      time: the goodput that would be; restarts, which the save interval does not change, at what they took.
      reached_steps: the run's own share of steps, rewinds apart, over `steps`: above 1 where it had luck. What may
        have been lost unseen is taken as lost.
      reached_time: its goodput over `time`, unseen steps likewise.
    """

    steps: float
    time: float
    reached_steps: float
    reached_time: float


@dataclasses.dataclass(frozen=True)
class Story:
    """What became of a run.

    Attributes:
      starts: in their order.
      spans: of the whole time, in order and without gaps.
      seconds: by class, all of `CLASSES`.
      kept_steps: that count.
      lost_by_restarts: steps that a later start did again.
      lost_by_rewinds: steps that the same start did again.
      unseen_most: steps that killed starts may have done, and lost, after their last signs.
      failures: starts that did steps, ended otherwise than in good order, and were followed by another.
      allowed: None where nothing failed, or how often the run saves is not known.
    """

    starts: Sequence[Start]
    spans: Sequence[Span]
    seconds: Mapping[str, float]
    kept_steps: int
    lost_by_restarts: int
    lost_by_rewinds: int
    unseen_most: int
    failures: int
    allowed: Allowed | None

    @property
    def total_s(self) -> float:
        return sum(self.seconds.values())

    @property
    def goodput(self) -> float | None:
        """Productive time over all time."""
        return self.seconds[PRODUCTIVE] / self.total_s if self.total_s else None

    @property
    def steps_goodput(self) -> float | None:
        """Steps that count over all that were done."""
        done = self.kept_steps + self.lost_by_restarts + self.lost_by_rewinds
        return self.kept_steps / done if done else None


@dataclasses.dataclass
class _Segment:
    """Steps lo+1 … hi in a row; `rewound`: it began by a rewind. Those above `ceiling` were done again."""

    lo: int
    hi: int
    rewound: bool
    ceiling: int = 0

    @property
    def lost(self) -> int:
        return self.hi - max(self.lo, min(self.hi, self.ceiling))


@dataclasses.dataclass(frozen=True)
class _Piece:
    """A part of a segment."""

    segment: _Segment
    lo: int
    hi: int

    @property
    def lost(self) -> int:
        return self.hi - max(self.lo, min(self.hi, self.segment.ceiling))


@dataclasses.dataclass(frozen=True)
class _Interval:
    """Between two signs of a start: its clock, the pieces done, the seconds they took, and other seconds by class."""

    begin_s: float
    end_s: float
    pieces: Sequence[_Piece]
    step_s: float
    spent: Mapping[str, float]


def tell(events: Sequence[Event]) -> Story:
    """The story of all starts in `events`, which may be none."""
    runs: dict[str, list[Event]] = {}
    for event in events:
        runs.setdefault(event.run, []).append(event)
    read = [_read_start(run) for run in runs.values()]
    segments = [segment for one in read for segment in one[0]]
    lost_by_restarts, lost_by_rewinds = _settle(segments)
    starts, spans = [], []
    end_s, before = 0.0, None
    for number, (run, (own, intervals)) in enumerate(zip(runs.values(), read), start=1):
        first, last_clock_s = run[0], max(event.clock_s for event in run)
        began_s = first.time_s - first.clock_s
        down_s = 0.0 if before is None else max(0.0, began_s - before.time_s)
        if down_s:
            spans.append(Span(end_s, end_s + down_s, {DOWN: down_s}))
        begin_s = end_s + down_s
        own_spans = [_span(interval, begin_s) for interval in intervals if interval.end_s > interval.begin_s]
        spans += own_spans
        end_s, before = begin_s + last_clock_s, run[-1]
        ended, code, why = _ending(run, last=number == len(runs))
        signs = [run[0].step] + [event.step for event in run if event.kind == "progress"]
        starts.append(
            Start(
                number=number,
                began_s=began_s,
                begin_s=begin_s,
                end_s=end_s,
                from_step=own[0].lo,
                to_step=own[-1].hi,
                steps=sum(segment.hi - segment.lo for segment in own),
                lost=sum(segment.lost for segment in own),
                ended=ended,
                code=code,
                why=why,
                down_s=down_s,
                save_every=first.values.get("save_every") or 0,
                seconds=_sums(own_spans),
                seen_every=max((b - a for a, b in itertools.pairwise(signs)), default=0),
            )
        )
    seconds = _sums(spans)
    kept = sum(segment.hi - segment.lo - segment.lost for segment in segments)
    failed = [start for start in starts[:-1] if start.failed and start.steps]
    unseen = sum(max(0, start.seen_every - 1) for start in failed if start.ended in ("killed", "hung"))
    lost_share = lost_by_restarts / max(1, lost_by_restarts + lost_by_rewinds)
    allowed = _allowed(failed, seconds, kept, lost_by_restarts, unseen, seconds[LOST] * lost_share)
    return Story(starts, spans, seconds, kept, lost_by_restarts, lost_by_rewinds, unseen, len(failed), allowed)


def _read_start(run: Sequence[Event]) -> tuple[list[_Segment], list[_Interval]]:
    """The steps of a start, and its time from the process' start to its last sign."""
    starting = list(itertools.takewhile(lambda event: event.kind in _STARTING, run))
    rest, last_s = run[len(starting) :], max(event.clock_s for event in run)
    segment = _Segment(run[0].step, run[0].step, rewound=False)
    segments, pieces, intervals = [segment], [], []
    mark_s = max((event.clock_s for event in starting), default=0.0) if rest else last_s
    if mark_s:
        intervals.append(_Interval(0.0, mark_s, (), 0.0, {START_UP: mark_s}))
    sums, told = dict.fromkeys(("step_s", *_SPENT), 0.0), dict.fromkeys(_SPENT.values(), 0.0)

    def done(step: int) -> None:
        if step > segment.hi:
            pieces.append(_Piece(segment, segment.hi, step))
            segment.hi = step

    for event in rest:
        values = event.values
        if event.kind in _DONE:
            done(event.step)
        if event.kind == "rewind":
            done(values["from_step"])
            segment = _Segment(values["to_step"], values["to_step"], rewound=True)
            segments.append(segment)
        elif event.kind == "progress":
            now = {name: max(sums[name], values.get(name) or 0.0) for name in sums}
            spent = {kind: now[name] - sums[name] for name, kind in _SPENT.items()}
            intervals.append(_Interval(mark_s, event.clock_s, tuple(pieces), now["step_s"] - sums["step_s"], spent))
            sums, pieces, mark_s = now, [], event.clock_s
            told = dict.fromkeys(told, 0.0)
        elif event.kind in ("evaluation", "save"):
            told[EVALUATION if event.kind == "evaluation" else SAVING] += values.get("seconds") or 0.0
    # After the last sum: what single events say; steps as long as they were before, the rest is unexplained.
    left_s = max(0.0, last_s - mark_s - sum(told.values()))
    known = sum(piece.hi - piece.lo for interval in intervals for piece in interval.pieces)
    ahead = sum(piece.hi - piece.lo for piece in pieces)
    step_s = min(left_s, sums["step_s"] / known * ahead) if known else left_s
    intervals.append(_Interval(mark_s, last_s, tuple(pieces), step_s, told))
    return segments, intervals


def _settle(segments: Sequence[_Segment]) -> tuple[int, int]:
    """Finds up to where each segment counts; the steps lost by restarts, and by rewinds."""
    lost = {False: 0, True: 0}
    lowest = [segment.lo for segment in segments]  # Of a segment and all after it.
    for index in range(len(segments) - 2, -1, -1):
        lowest[index] = min(lowest[index], lowest[index + 1])
    for index, segment in enumerate(segments):
        segment.ceiling = segment.hi
        for later in range(index + 1, len(segments)):
            if lowest[later] >= segment.ceiling or segment.ceiling <= segment.lo:
                break
            ceiling = max(segment.lo, min(segment.ceiling, segments[later].lo))
            lost[segments[later].rewound] += segment.ceiling - ceiling
            segment.ceiling = ceiling
    return lost[False], lost[True]


def _span(interval: _Interval, begin_s: float) -> Span:
    """The interval on the story's axis, its seconds split into classes."""
    length_s = interval.end_s - interval.begin_s
    steps = sum(piece.hi - piece.lo for piece in interval.pieces)
    seconds = dict(interval.spent)
    if steps:
        lost = sum(piece.lost for piece in interval.pieces)
        seconds[LOST] = interval.step_s * lost / steps
        seconds[PRODUCTIVE] = interval.step_s * (steps - lost) / steps
    total_s = sum(seconds.values())
    if total_s > length_s:  # The clock of an event is a moment younger than the sums in it.
        seconds = {kind: value * length_s / total_s for kind, value in seconds.items()}
    else:
        seconds[OTHER] = length_s - total_s
    return Span(begin_s + interval.begin_s, begin_s + interval.end_s, seconds)


def _sums(spans: Sequence[Span]) -> dict[str, float]:
    return {kind: sum(span.seconds.get(kind, 0.0) for span in spans) for kind in CLASSES}


def _ending(run: Sequence[Event], last: bool) -> tuple[str, int | None, str]:
    """How a start ended, its exit code, and why."""
    stop = next((event for event in reversed(run) if event.kind == "stop"), None)
    hang = next((event for event in reversed(run) if event.kind == "hang"), None)
    code = None if stop is None else stop.values.get("code")
    why = "" if stop is None else str(stop.values.get("why") or "")
    if hang is not None and run[-1] in (hang, stop):
        return "hung", code, why or f"waiting for {hang.values.get('what')}"
    if any(event.kind == "device_failure" for event in run[-2:]):
        return "device failure", code, why
    if stop is None:
        return "" if last else "killed", None, ""
    return _ENDINGS.get(code, "error"), code, why


def _allowed(
    failed: Sequence[Start], seconds: Mapping[str, float], kept: int, lost: int, unseen: int, lost_s: float
) -> Allowed | None:
    """Of `kept` steps, `lost` ones that took `lost_s`, and at most `unseen` ones whose time is in `down`."""
    if not failed or not kept or not seconds[PRODUCTIVE] or not all(start.save_every for start in failed):
        return None
    mean_lost = sum(start.save_every / 2 for start in failed)
    steps = kept / (kept + mean_lost)
    step_s, total_s = seconds[PRODUCTIVE] / kept, sum(seconds.values())
    without_s = total_s - lost_s - min(seconds[DOWN], unseen * step_s)
    time = seconds[PRODUCTIVE] / (without_s + mean_lost * step_s)
    return Allowed(steps, time, kept / (kept + lost + unseen) / steps, seconds[PRODUCTIVE] / total_s / time)
