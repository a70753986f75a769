"""Reads the contents of a run's report from its workdir: metrics, events, images and results. Read-only."""

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
from aimv2_jax.monitoring.events import Event, has_events, read_events
from aimv2_jax.monitoring.goodput import GoodputReport, compute_goodput
from aimv2_jax.monitoring.metrics import has_metrics, read_lines
from aimv2_jax.storage.files import is_remote
from aimv2_jax.untrusted import as_int, as_number, is_inside, parse_json, printable, read_file

_CONFIG = "config.txt"
_METRICS = "metrics.jsonl"
_BAD_RECORDS = re.compile(r"bad_records(\.\d+)?\.jsonl")
# Folders without images or results for the report.
_EXCLUDED_FOLDERS = ("checkpoints", "compiled", "tensorboard", "profile", "wandb")
_MAX_DEPTH = 3  # Levels of folders below the workdir.
_MAX_IMAGES = 6
_EXCLUDED_IMAGES = ("curves.png",)  # Written by eval/visualize.py; the page draws newer curves.
_MAX_RESULT_BYTES = 2**20
_MAX_IMAGE_BYTES = 2**26
_MAX_STEP = 2**53
_MAX_TEXT_CHARS = 1000
_RUNNING_S = 300.0  # A run whose last event is more recent than this counts as running.


@dataclasses.dataclass(frozen=True)
class Result:
    """A result file of an evaluation: formatted values by name, and the title `what`."""

    file: str
    what: str
    figures: Mapping[str, str]


@dataclasses.dataclass(frozen=True)
class Facts:
    """Contents of a run's report.

    Attributes:
      workdir: as given by the user.
      written_s: time of reading, seconds since 1970.
      training, evaluation: lines of metrics.jsonl, in the order of steps.
      has_events: False if the run has no event log.
      events: of all starts.
      report: goodput computed from the events.
      total_steps: the last step of the run; None if unknown.
      config: text of config.txt; None if it does not exist.
      drops: records that could not be used, {(source, reason): count}, from the metrics.
      examples_read: number of examples by source.
      bad_records: a few lines of bad_records.jsonl, newest first.
      images: the newest PNGs, (name in the workdir, path, modification time).
      results: of probes and other evaluations.
    """

    workdir: str
    written_s: float
    training: Sequence[Mapping[str, Any]]
    evaluation: Sequence[Mapping[str, Any]]
    has_events: bool
    events: Sequence[Event]
    report: GoodputReport
    total_steps: int | None
    config: str | None
    drops: Mapping[tuple[str, str], int]
    examples_read: Mapping[str, int]
    bad_records: Sequence[Mapping[str, Any]]
    images: Sequence[tuple[str, epath.Path, float]]
    results: Sequence[Result]

    @property
    def name(self) -> str:
        return epath.Path(self.workdir).name or self.workdir

    @property
    def newest_step(self) -> int:
        """The last step in the metrics or the event log."""
        lines = [line["step"] for line in (*self.training[-1:], *self.evaluation[-1:])]
        return max([*lines, *(start.to_step for start in self.report.starts[-1:])], default=0)

    def state(self) -> str:
        """The state of the run as text."""
        total = f" of {self.total_steps:,}" if self.total_steps is not None else ""
        position = f"step {self.newest_step:,}{total}"
        if not self.report.starts:
            finished = self.total_steps is not None and self.newest_step >= self.total_steps
            return f"{'finished' if finished else 'not finished'}: {position}"
        start, last = self.report.starts[-1], self.events[-1]
        if not start.ended:
            silence_s = max(0.0, self.written_s - last.time_s)
            is_running = silence_s < max(_RUNNING_S, 3 * _longest_gap_s(self.events, last.run))
            status = "running" if is_running else "no end was logged: killed, or it cannot reach its workdir"
            return f"{status}: {position}, last event {format_duration(silence_s)} ago"
        labels = {"stopped": "stopped on request", "guard": "stopped by a guard", "hung": "ended after a hang"}
        why = f" ({start.why})" if start.why and start.ended != "finished" else ""
        return f"{labels.get(start.ended, start.ended)}: {position}{why}"


def gather(workdir: epath.PathLike, now_s: float | None = None) -> Facts:
    """Reads all facts of a run.

    Raises:
      UserError: when the folder has no run, or a file in it is damaged.
    """
    folder = epath.Path(workdir)
    if not folder.is_dir():
        raise UserError("no such folder", str(workdir), "Give the --workdir of a training run")
    lines = _metric_lines(folder / _METRICS) if has_metrics(folder) else []
    events = [dataclasses.replace(event, values=_printable(event.values)) for event in read_events(folder)]
    config = (folder / _CONFIG).read_text(encoding="utf-8") if (folder / _CONFIG).exists() else None
    if not lines and not events and config is None:
        raise UserError("no run in this folder", str(workdir), "Give the --workdir of a training run")
    drops = collections.Counter()
    examples_read = collections.Counter()
    for line in lines:
        for name, value in line.items():
            kind, _, rest = name.partition("/")
            if kind == "images":
                examples_read[rest] += value or 0
            elif kind == "bad":
                source, _, reason = rest.rpartition("/")
                drops[source, reason] += value or 0
    files = list(_files(folder, _MAX_DEPTH))
    return Facts(
        workdir=str(workdir),
        written_s=time.time() if now_s is None else now_s,
        training=[line for line in lines if "eval_loss" not in line],
        evaluation=[line for line in lines if "eval_loss" in line],
        has_events=has_events(folder),
        events=events,
        report=compute_goodput(events),
        total_steps=_total_steps(events, config),
        config=config,
        drops=dict(sorted(drops.items())),
        examples_read=dict(sorted(examples_read.items())),
        bad_records=_bad_records(folder),
        images=_images(folder, files),
        results=_results(folder, files),
    )


def _metric_lines(path: epath.Path) -> list[dict[str, Any]]:
    """Reads the lines of metrics.jsonl; a line with an impossible step or value is skipped and logged."""
    lines = []
    for line in read_lines(path):
        try:
            as_int(line["step"], 0, _MAX_STEP)
            for value in line.values():
                if value is not None:
                    as_number(value, math.inf)
        except (ValueError, OverflowError):
            print_line(
                f"{path}: a line with an impossible step or value is skipped ({printable(str(line)[:80])})", sys.stderr
            )
        else:
            lines.append(line)
    return [{printable(name): value for name, value in line.items()} for line in lines]


def _printable(value: Any) -> Any:
    """`value` with all text made safe to print: it is untrusted and printed on a terminal."""
    if isinstance(value, str):
        return printable(value, _MAX_TEXT_CHARS)
    if isinstance(value, Mapping):
        return {printable(str(name)): _printable(item) for name, item in value.items()}
    return [_printable(item) for item in value] if isinstance(value, (list, tuple)) else value


def _total_steps(events: Sequence[Event], config: str | None) -> int | None:
    logged = [event.values.get("steps") for event in events if event.kind == "start"]
    if logged and isinstance(logged[-1], int):
        return logged[-1]
    match = re.search(r"^train\.steps = (\d+)$", config or "", re.MULTILINE)
    return int(match[1]) if match else None


def _longest_gap_s(events: Sequence[Event], run: str) -> float:
    clock = [event.clock_s for event in events if event.run == run]
    return max((after - before for before, after in itertools.pairwise(clock)), default=0.0)


def _bad_records(folder: epath.Path, max_lines: int = 5) -> list[dict[str, Any]]:
    lines = []
    for path in folder.iterdir():
        if _BAD_RECORDS.fullmatch(path.name):
            lines += read_lines(path)[-max_lines:]
    return [_printable(line) for line in sorted(lines, key=lambda line: -line["step"])[:max_lines]]


def _files(folder: epath.Path, depth: int) -> Iterator[epath.Path]:
    """Files of the folder, without those that a link leads to elsewhere, since the page is shared with others."""
    for path in sorted(folder.iterdir()):
        if not is_remote(path) and not is_inside(path, folder):
            continue
        if path.name.startswith("."):
            continue
        if path.is_dir():
            if depth and path.name not in _EXCLUDED_FOLDERS:
                yield from _files(path, depth - 1)
        else:
            yield path


def read_bytes(path: epath.Path, max_bytes: int) -> bytes:
    """Reads a file of the workdir; raises `ValueError` if it is no regular file, or larger than `max_bytes`."""
    if not is_remote(path):
        return read_file(path, max_bytes)
    if path.stat().length > max_bytes:
        raise ValueError("too large")
    return path.read_bytes()


def image_bytes(path: epath.Path) -> bytes:
    """Reads one of `Facts.images`; raises as `read_bytes`."""
    return read_bytes(path, _MAX_IMAGE_BYTES)


def _images(folder: epath.Path, files: Sequence[epath.Path]) -> list[tuple[str, epath.Path, float]]:
    images = [
        (_relative_name(folder, path), path, float(path.stat().mtime))
        for path in files
        if path.name.lower().endswith(".png") and path.name not in _EXCLUDED_IMAGES
    ]
    return sorted(images, key=lambda image: (-image[2], image[0]))[:_MAX_IMAGES]


def _relative_name(folder: epath.Path, path: epath.Path) -> str:
    return str(path.relative_to(folder))


# --- results of evaluations --------------------------------------------------------------------------------------


def _results(folder: epath.Path, files: Sequence[epath.Path]) -> list[Result]:
    """Parses the JSON files that eval/ writes; other files are ignored."""
    results = []
    for path in files:
        if not path.name.endswith(".json"):
            continue
        try:
            content = parse_json(read_bytes(path, _MAX_RESULT_BYTES))
        except (ValueError, OSError):
            continue
        results += _result(_relative_name(folder, path), content, "")
    return results


def _result(file: str, content: Any, suffix: str) -> list[Result]:
    """Results in the JSON `content`; titles end with `suffix`."""
    if not isinstance(content, Mapping):
        return []
    if "top1" in content and "label" in content:
        interval = content.get("ci95")
        low, high = interval if isinstance(interval, list) and len(interval) == 2 else (None, None)
        figures = {
            "top-1": format_number(content["top1"]),
            "95 % interval": f"{format_number(low)} to {format_number(high)}",
        }
        if isinstance(content.get("floor"), Mapping):
            figures["pixel floor"] = format_number(content["floor"].get("top1"))
        if isinstance(content.get("less_prior"), Mapping):
            figures["top-1 less prior"] = format_number(content["less_prior"].get("top1"))
        kind = f"{content['kind']} probe" if "kind" in content else "zero-shot"
        return [Result(file, f"{kind} of {content['label']}{suffix}", figures)]
    if "text_to_image" in content:
        figures = {
            f"{way.replace('_', ' ')} {name}": format_number(value)
            for way in ("text_to_image", "image_to_text")
            if isinstance(content.get(way), Mapping)
            for name, value in content[way].items()
        }
        return [Result(file, f"retrieval{suffix}", figures)]
    if "loss_image" in content or "loss_text" in content:
        figures = {name.replace("_", " "): format_number(value) for name, value in content.items() if value is not None}
        return [Result(file, f"held-out figures{suffix}", figures)]
    inner = [_result(file, value, f" at {name}") for name, value in content.items() if isinstance(value, Mapping)]
    return [result for results in inner for result in results]


# --- formatting --------------------------------------------------------------------------------------------------


def format_number(value: Any) -> str:
    """Formats a number with four digits; None is a dash."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return "-" if value is None else printable(str(value))
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:,.1f}" if abs(value) >= 1000 else f"{value:#.4g}" if value else "0"


def format_percent(fraction: float | None) -> str:
    """Formats a fraction from 0 to 1 as a percentage; None is a dash."""
    return "-" if fraction is None else f"{100 * fraction:.1f} %"


def format_duration(seconds: float) -> str:
    """Formats a duration with two units, as `3 h 05 min`; a dash if it is not finite."""
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


def format_time(time_s: float) -> str:
    """Formats seconds since 1970 as date and time, UTC."""
    return datetime.fromtimestamp(time_s, UTC).strftime("%Y-%m-%d %H:%M:%S")


# Descriptions of notable kinds of events. Routine kinds, such as saves and progress, are not listed.
_DESCRIPTIONS = {
    "damaged": lambda e: (
        f"checkpoint is damaged: {_joined(e.values.get('files'))}; moved to {e.values.get('moved_to')}"
    ),
    "save_failed": lambda e: f"save failed: {e.values.get('why')}",
    "preemption": lambda e: "stop requested",
    "nonfinite": lambda e: (
        f"not finite: loss {format_number(e.values.get('loss'))}, "
        f"gradient norm {format_number(e.values.get('grad_norm'))}; "
        f"its update was skipped; input of a replay: {e.values.get('file')}"
    ),
    "spike": lambda e: f"spike: {_joined(e.values.get('values'))}; {e.values.get('action')}",
    "skip": lambda e: f"batches {_batches(e)} skipped: {e.values.get('why')}",
    "rewind": lambda e: (
        f"rewound from step {format_number(e.values.get('from_step'))} to {format_number(e.values.get('to_step'))}, "
        f"skipping batches {_batches(e)}"
    ),
    "data_changed": lambda e: f"continued with changed data, as accepted: {_joined(e.values.get('what'))}",
    "bad_data": lambda e: f"bad records skipped: {_joined(e.values.get('counts'))}",
    "hang": lambda e: f"hung while waiting for {e.values.get('what')}; stacks: {e.values.get('file')}",
    "device_failure": lambda e: f"a device failed: {e.values.get('status')}; traceback: {e.values.get('file')}",
    "worker_restarted": lambda e: (
        f"a loader worker {e.values.get('what')}, and all workers were restarted; it {e.values.get('at')}"
    ),
    "corruption": lambda e: (
        f"recomputation gave different bits: {e.values.get('leaf')} on {e.values.get('device')} "
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
    "data_changed": "changed data",
    "bad_data": "bad data",
    "hang": "hang",
    "device_failure": "device failure",
    "worker_restarted": "worker restarted",
    "corruption": "silent corruption",
}


def _joined(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {format_number(item)}" for name, item in value.items())
    if isinstance(value, (list, tuple)):
        return ", ".join(str(item) for item in value)
    return str(value)


def _batches(event: Event) -> str:
    """The range [a, b) with both ends inclusive."""
    a, b = event.values.get("a"), event.values.get("b")
    return f"{format_number(a)} to {format_number(b - 1 if isinstance(b, int) else b)}"


def is_notable(event: Event) -> bool:
    """Whether the report lists the event individually."""
    return event.kind in _DESCRIPTIONS


def event_label(kind: str) -> str:
    """Display name of a kind of event."""
    return _LABELS.get(kind, kind)


def describe_event(event: Event) -> str:
    """Description of a notable event."""
    return _DESCRIPTIONS[event.kind](event)


def count_notable(facts: Facts) -> dict[str, int]:
    """Number of notable events by kind, in the order of the table; {label: count}."""
    counts = collections.Counter(event.kind for event in facts.events if is_notable(event))
    return {event_label(kind): counts[kind] for kind in _DESCRIPTIONS if counts[kind]}
