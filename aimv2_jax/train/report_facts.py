"""What a report tells of a run: all that lies in its workdir, read and put in order. Writes and disturbs nothing."""

from __future__ import annotations

import collections
import dataclasses
import itertools
import math
import re
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

from etils import epath

from aimv2_jax.console import print_line
from aimv2_jax.errors import UserError
from aimv2_jax.files import is_remote
from aimv2_jax.train.events import Event, has_events, read_events
from aimv2_jax.train.goodput import Story, tell
from aimv2_jax.train.metrics import has_metrics, read_lines
from aimv2_jax.untrusted import as_int, as_number, is_inside, parse_json, printable, read_file

_CONFIG = "config.txt"
_METRICS = "metrics.jsonl"
_BAD_RECORDS = re.compile(r"bad_records(\.\d+)?\.jsonl")
# Folders in which no picture or result of a person's is.
_OTHERS = ("checkpoints", "compiled", "tensorboard", "profile", "wandb")
_DEEPEST = 3  # Folders below the workdir.
_MOST_PICTURES = 6
_DRAWN_ANYWAY = ("curves.png",)  # By eval/show.py: the page has its own, of the newest lines.
_LARGEST_RESULT = 2**20  # Bytes.
_LARGEST_PICTURE = 2**26  # Bytes.
_MAX_STEP = 2**53
_MAX_TEXT = 1000  # Characters of a text that the run wrote.
_SILENCE_S = 300.0  # A run whose last sign is younger than this may well be at work.


@dataclasses.dataclass(frozen=True)
class Result:
    """What an evaluation wrote to a file: figures by their names, and what they are of."""

    file: str
    what: str
    figures: Mapping[str, str]


@dataclasses.dataclass(frozen=True)
class Facts:
    """All that is told.

    Attributes:
      workdir: as it was given.
      written_s: when this was read, seconds since 1970.
      training, evaluation: lines of metrics.jsonl, in the order of steps.
      has_books: False for a run of before there were events.
      events: of all starts.
      story: what they come to.
      total_steps: where the run ends; None where nothing says so.
      config: config.txt; None where there is none.
      drops: records that could not be used, {(source, reason): count}, as the metrics have it.
      read: examples by source.
      examples: a few lines of bad_records.jsonl, newest first.
      pictures: the newest PNGs, (name in the workdir, path, when it was written).
      results: of probes and the like.
    """

    workdir: str
    written_s: float
    training: Sequence[Mapping[str, Any]]
    evaluation: Sequence[Mapping[str, Any]]
    has_books: bool
    events: Sequence[Event]
    story: Story
    total_steps: int | None
    config: str | None
    drops: Mapping[tuple[str, str], int]
    read: Mapping[str, int]
    examples: Sequence[Mapping[str, Any]]
    pictures: Sequence[tuple[str, epath.Path, float]]
    results: Sequence[Result]

    @property
    def name(self) -> str:
        return epath.Path(self.workdir).name or self.workdir

    @property
    def newest_step(self) -> int:
        """The last step that metrics or books know of."""
        lines = [line["step"] for line in (*self.training[-1:], *self.evaluation[-1:])]
        return max([*lines, *(start.to_step for start in self.story.starts[-1:])], default=0)

    def state(self) -> str:
        """How the run stands, in words."""
        of = f" of {self.total_steps:,}" if self.total_steps is not None else ""
        at = f"step {self.newest_step:,}{of}"
        if not self.story.starts:
            finished = self.total_steps is not None and self.newest_step >= self.total_steps
            return f"{'finished' if finished else 'not finished'}: {at}"
        start, last = self.story.starts[-1], self.events[-1]
        if not start.ended:
            silence_s = max(0.0, self.written_s - last.time_s)
            alive = silence_s < max(_SILENCE_S, 3 * _longest_silence_s(self.events, last.run))
            words = "at work" if alive else "no end is written: killed, or it cannot reach its workdir"
            return f"{words}: {at}, last sign {duration(silence_s)} ago"
        words = {"stopped": "stopped on request", "guard": "stopped by a guard", "hung": "ended after a hang"}
        why = f" ({start.why})" if start.why and start.ended != "finished" else ""
        return f"{words.get(start.ended, start.ended)}: {at}{why}"


def gather(workdir: epath.PathLike, now_s: float | None = None) -> Facts:
    """Reads what there is of a run.

    Raises:
      UserError: where the folder has no run, or a file in it is damaged.
    """
    folder = epath.Path(workdir)
    if not folder.is_dir():
        raise UserError("no such folder", str(workdir), "Give the --workdir of a training run")
    lines = _metric_lines(folder / _METRICS) if has_metrics(folder) else []
    events = [dataclasses.replace(event, values=_printable(event.values)) for event in read_events(folder)]
    config = (folder / _CONFIG).read_text(encoding="utf-8") if (folder / _CONFIG).exists() else None
    if not lines and not events and config is None:
        raise UserError("no run in this folder", str(workdir), "Give the --workdir of a training run")
    drops, read = collections.Counter(), collections.Counter()
    for line in lines:
        for name, value in line.items():
            kind, _, rest = name.partition("/")
            if kind == "images":
                read[rest] += value or 0
            elif kind == "bad":
                source, _, reason = rest.rpartition("/")
                drops[source, reason] += value or 0
    files = list(_files(folder, _DEEPEST))
    return Facts(
        workdir=str(workdir),
        written_s=time.time() if now_s is None else now_s,
        training=[line for line in lines if "eval_loss" not in line],
        evaluation=[line for line in lines if "eval_loss" in line],
        has_books=has_events(folder),
        events=events,
        story=tell(events),
        total_steps=_total_steps(events, config),
        config=config,
        drops=dict(sorted(drops.items())),
        read=dict(sorted(read.items())),
        examples=_bad_examples(folder),
        pictures=_pictures(folder, files),
        results=_results(folder, files),
    )


def _metric_lines(path: epath.Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl; one with a step or a value that no run writes is left out, and named."""
    lines = []
    for line in read_lines(path):
        try:
            as_int(line["step"], 0, _MAX_STEP)
            for value in line.values():
                if value is not None:
                    as_number(value, math.inf)
        except (ValueError, OverflowError):
            print_line(f"{path}: a line that no run writes is left out ({printable(str(line)[:80])})", sys.stderr)
        else:
            lines.append(line)
    return [{printable(name): value for name, value in line.items()} for line in lines]


def _printable(value: Any) -> Any:
    """`value` with its texts on one line each: they may be anybody's, and are printed on a terminal."""
    if isinstance(value, str):
        return printable(value, _MAX_TEXT)
    if isinstance(value, Mapping):
        return {printable(str(name)): _printable(item) for name, item in value.items()}
    return [_printable(item) for item in value] if isinstance(value, (list, tuple)) else value


def _total_steps(events: Sequence[Event], config: str | None) -> int | None:
    told = [event.values.get("steps") for event in events if event.kind == "start"]
    if told and isinstance(told[-1], int):
        return told[-1]
    found = re.search(r"^train\.steps = (\d+)$", config or "", re.MULTILINE)
    return int(found[1]) if found else None


def _longest_silence_s(events: Sequence[Event], run: str) -> float:
    clock = [event.clock_s for event in events if event.run == run]
    return max((after - before for before, after in itertools.pairwise(clock)), default=0.0)


def _bad_examples(folder: epath.Path, most: int = 5) -> list[dict[str, Any]]:
    lines = []
    for path in folder.iterdir():
        if _BAD_RECORDS.fullmatch(path.name):
            lines += read_lines(path)[-most:]
    return [_printable(line) for line in sorted(lines, key=lambda line: -line["step"])[:most]]


def _files(folder: epath.Path, depth: int) -> Iterator[epath.Path]:
    """Files of the folder; not those that a link leads to elsewhere, since the page is for others to read."""
    for path in sorted(folder.iterdir()):
        if not is_remote(path) and not is_inside(path, folder):
            continue
        if path.name.startswith("."):
            continue
        if path.is_dir():
            if depth and path.name not in _OTHERS:
                yield from _files(path, depth - 1)
        else:
            yield path


def read_bytes(path: epath.Path, most: int) -> bytes:
    """A file of the workdir; raises `ValueError` where it is no regular file, or larger than `most` bytes."""
    if not is_remote(path):
        return read_file(path, most)
    if path.stat().length > most:
        raise ValueError("too large")
    return path.read_bytes()


def picture_bytes(path: epath.Path) -> bytes:
    """One of `Facts.pictures`; raises as `read_bytes`."""
    return read_bytes(path, _LARGEST_PICTURE)


def _pictures(folder: epath.Path, files: Sequence[epath.Path]) -> list[tuple[str, epath.Path, float]]:
    found = [
        (_inside(folder, path), path, float(path.stat().mtime))
        for path in files
        if path.name.lower().endswith(".png") and path.name not in _DRAWN_ANYWAY
    ]
    return sorted(found, key=lambda picture: (-picture[2], picture[0]))[:_MOST_PICTURES]


def _inside(folder: epath.Path, path: epath.Path) -> str:
    return str(path.relative_to(folder))


# --- results of evaluations --------------------------------------------------------------------------------------


def _results(folder: epath.Path, files: Sequence[epath.Path]) -> list[Result]:
    """Of the JSON files that eval/ writes; others are passed over."""
    results = []
    for path in files:
        if not path.name.endswith(".json"):
            continue
        try:
            content = parse_json(read_bytes(path, _LARGEST_RESULT))
        except (ValueError, OSError):
            continue
        results += _result(_inside(folder, path), content, "")
    return results


def _result(file: str, content: Any, at: str) -> list[Result]:
    if not isinstance(content, Mapping):
        return []
    if "top1" in content and "label" in content:
        interval = content.get("ci95")
        low, high = interval if isinstance(interval, list) and len(interval) == 2 else (None, None)
        figures = {"top-1": number(content["top1"]), "95 % interval": f"{number(low)} to {number(high)}"}
        if isinstance(content.get("floor"), Mapping):
            figures["pixel floor"] = number(content["floor"].get("top1"))
        if isinstance(content.get("less_prior"), Mapping):
            figures["top-1 less prior"] = number(content["less_prior"].get("top1"))
        kind = f"{content['kind']} probe" if "kind" in content else "zero-shot"
        return [Result(file, f"{kind} of {content['label']}{at}", figures)]
    if "text_to_image" in content:
        figures = {
            f"{way.replace('_', ' ')} {name}": number(value)
            for way in ("text_to_image", "image_to_text")
            if isinstance(content.get(way), Mapping)
            for name, value in content[way].items()
        }
        return [Result(file, f"retrieval{at}", figures)]
    if "loss_image" in content or "loss_text" in content:
        figures = {name.replace("_", " "): number(value) for name, value in content.items() if value is not None}
        return [Result(file, f"held-out figures{at}", figures)]
    inner = [_result(file, value, f" at {name}") for name, value in content.items() if isinstance(value, Mapping)]
    return [result for results in inner for result in results]


# --- in words ----------------------------------------------------------------------------------------------------


def number(value: Any) -> str:
    """A figure with four digits; a dash for what is not known."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return "-" if value is None else printable(str(value))
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:,.1f}" if abs(value) >= 1000 else f"{value:#.4g}" if value else "0"


def percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.1f} %"


def duration(seconds: float) -> str:
    """Two units, as `3 h 05 min`; a dash for what is no time."""
    if not math.isfinite(seconds):
        return "-"
    if seconds < 59.95:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes_left = divmod(minutes, 60)
    days, hours_left = divmod(hours, 24)
    if days:
        return f"{days} d {hours_left:02d} h"
    return f"{hours} h {minutes_left:02d} min" if hours else f"{minutes} min {seconds:02d} s"


def moment(time_s: float) -> str:
    """A point in time, UTC."""
    return datetime.fromtimestamp(time_s, UTC).strftime("%Y-%m-%d %H:%M:%S")


# What a person reads of the kinds of events that are not everyday's, and how.
_TOLD = {
    "damaged": lambda e: (
        f"checkpoint is damaged: {_listed(e.values.get('files'))}; moved to {e.values.get('moved_to')}"
    ),
    "save_failed": lambda e: f"save failed: {e.values.get('why')}",
    "preemption": lambda e: "asked to stop",
    "nonfinite": lambda e: (
        f"not finite: loss {number(e.values.get('loss'))}, gradient norm {number(e.values.get('grad_norm'))}; "
        f"nothing of it kept; for a replay: {e.values.get('file')}"
    ),
    "spike": lambda e: f"spike: {_listed(e.values.get('values'))}; {e.values.get('action')}",
    "skip": lambda e: f"batches {_batches(e)} left out: {e.values.get('why')}",
    "rewind": lambda e: (
        f"rewound from step {number(e.values.get('from_step'))} to {number(e.values.get('to_step'))}, "
        f"without batches {_batches(e)}"
    ),
    "data_changed": lambda e: f"goes on with other data, as accepted: {_listed(e.values.get('what'))}",
    "bad_data": lambda e: f"records left out: {_listed(e.values.get('counts'))}",
    "hang": lambda e: f"hung, waiting for {e.values.get('what')}; stacks: {e.values.get('file')}",
    "device_failure": lambda e: f"a device failed: {e.values.get('status')}; traceback: {e.values.get('file')}",
    "worker_restarted": lambda e: (
        f"a loader's worker {e.values.get('what')}, and all were started again; it {e.values.get('at')}"
    ),
    "corruption": lambda e: (
        f"computed twice, with different bits: {e.values.get('leaf')} on {e.values.get('device')} "
        f"of {e.values.get('host')}"
    ),
}
_LABELS = {
    "damaged": "damaged checkpoint",
    "save_failed": "failed save",
    "preemption": "preemption",
    "nonfinite": "not finite",
    "spike": "spike",
    "skip": "skip",
    "rewind": "rewind",
    "data_changed": "other data",
    "bad_data": "bad data",
    "hang": "hang",
    "device_failure": "device failure",
    "worker_restarted": "worker restarted",
    "corruption": "silent corruption",
}


def _listed(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {number(item)}" for name, item in value.items())
    if isinstance(value, (list, tuple)):
        return ", ".join(str(item) for item in value)
    return str(value)


def _batches(event: Event) -> str:
    """Of [a, b), with both ends."""
    a, b = event.values.get("a"), event.values.get("b")
    return f"{number(a)} to {number(b - 1 if isinstance(b, int) else b)}"


def is_news(event: Event) -> bool:
    """Whether a person wants to read of it by itself."""
    return event.kind in _TOLD


def label(kind: str) -> str:
    """A kind of event in words."""
    return _LABELS.get(kind, kind)


def words(event: Event) -> str:
    """What happened, for one of `is_news`."""
    return _TOLD[event.kind](event)


def counted_news(facts: Facts) -> dict[str, int]:
    """How often each kind of news came, in the order of the table; {label: count}."""
    counts = collections.Counter(event.kind for event in facts.events if is_news(event))
    return {label(kind): counts[kind] for kind in _TOLD if counts[kind]}
