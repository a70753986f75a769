"""Report of a run: state, newest and best metrics, time by class, starts, notable events with remedies, and data.

    python -m aimv2_jax.monitoring.report WORKDIR [--output FILE.html]

Prints the report and writes an HTML page with the same text, curves with the events marked in them, the newest images
in the workdir and its folders, and the config: WORKDIR/report.html, unless --output names another file. The page needs
no network and no other file. A running trainer is not disturbed.

Time is productive (steps that the current state depends on; their share is the goodput), lost (steps done again after a
restart or a rewind), start-up (before the first step of a start), data (waiting for batches), evaluation, saving (steps
blocked on saves), down (between two starts), or other.
"""

from __future__ import annotations

import collections
import dataclasses
import itertools
import math
import re
import sys
import time
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from etils import epath

from aimv2_jax.cli import Parser, check_output
from aimv2_jax.console import print_line
from aimv2_jax.errors import EXIT_FINISHED, UserError, cli_main
from aimv2_jax.monitoring.curves import curves_figure
from aimv2_jax.monitoring.events import Event, read_events
from aimv2_jax.monitoring.goodput import GoodputReport, compute_goodput
from aimv2_jax.monitoring.metrics import format_duration, has_metrics, read_lines
from aimv2_jax.monitoring.report_page import render_page
from aimv2_jax.plotting import counted
from aimv2_jax.storage.files import atomic_write, check_folder, exists, is_remote, read_bytes, with_retries
from aimv2_jax.untrusted import as_int, as_number, is_inside, printable

_METRICS = re.compile("loss.*|lr|grad_norm|images_per_s|mfu|data_wait_fraction|eval_.*")
_EXCLUDED_FOLDERS = ("checkpoints", "compiled", "tensorboard", "profile", "wandb")
_EXCLUDED_IMAGES = ("curves.png",)  # Written by eval/visualize.py; the page draws newer curves.
_MAX_IMAGES = 6
_MAX_STEP = 2**53
_MAX_LINE_CHARS = 1000
_RUNNING_S = 300.0  # A run whose last event is more recent than this counts as running.

_STATUS_LABELS = {
    "stopped": "stopped on request",
    "guard": "stopped by a guard",
    "hung": "ended after a hang",
    "killed": "no end was logged: killed, or it cannot reach its workdir",
}
_STATUS_REMEDIES = {  # After any other end, the remedy is to start again.
    "finished": "",
    "running": "",
    "guard": "Find the cause in the events below before you start it again.",
    "error": "Fix what the message names, then start the same command again.",
    "bug": "Report the traceback that the run printed.",
}
_START_AGAIN = "Start the same command again: it continues from the newest checkpoint."
# Descriptions of notable events, with remedies. Routine kinds, such as saves and progress, are not listed.
_DESCRIPTIONS = {
    "damaged": "checkpoint is damaged: {files}; moved to {moved_to}. Check the disk",
    "save_failed": "save failed: {why}. Check the free space and the permissions of the workdir",
    "preemption": "stop requested",
    "nonfinite": "loss {loss} or gradient norm {grad_norm} is not finite: update skipped; input of a replay: {file}",
    "spike": "spike: {values}; {action}. If spikes recur, set guard.spike to skip or rewind",
    "skip": "batches {a}:{b} skipped: {why}",
    "rewind": "rewound from step {from_step} to {to_step}, skipping batches {a}:{b}",
    "data_changed": "continued with changed data, as accepted: {what}",
    "bad_data": "bad records skipped: {counts}. They are named in bad_records.jsonl",
    "hang": "hung while waiting for {what}; stacks: {file}",
    "device_failure": "a device failed: {status}; traceback: {file}. Replace the device if it fails again",
    "worker_restarted": "a loader worker {what}, and all workers were restarted; it {at}",
    "corruption": "recomputation gave different bits: {leaf} on {device} of {host}. Take the device out of use",
}


@dataclasses.dataclass(frozen=True)
class Facts:
    """Contents of a run's workdir; lines of metrics and events are in the order of the files."""

    workdir: str  # As given by the user, safe to print.
    read_s: float  # Time of reading, seconds since 1970.
    training: Sequence[Mapping[str, Any]]
    evaluation: Sequence[Mapping[str, Any]]
    events: Sequence[Event]
    goodput: GoodputReport
    config: str
    images: Mapping[str, epath.Path]  # The newest PNGs by caption.

    @property
    def step(self) -> int:
        """The last step in the metrics or the event log."""
        lines = [line["step"] for line in (*self.training[-1:], *self.evaluation[-1:])]
        return max([*lines, *(start.to_step for start in self.goodput.starts[-1:])], default=0)

    @property
    def total_steps(self) -> int | None:
        """The last step of the run; None if unknown."""
        match = re.search(r"^train\.steps = (\d{1,18})$", self.config, re.MULTILINE)
        return int(match[1]) if match else None

    @property
    def best_evaluation(self) -> Mapping[str, Any] | None:
        """The line of the lowest held-out loss, of averaged parameters if the run has them, as for checkpoints."""
        losses = [line.get("eval_loss_ema", line["eval_loss"]) for line in self.evaluation]
        known = [(loss, index) for index, loss in enumerate(losses) if loss is not None]
        return self.evaluation[min(known)[1]] if known else None

    @property
    def status(self) -> str:
        """How the last start ended; "running" or "killed" if it logged no end."""
        if not self.events:
            return "finished" if self.step >= (self.total_steps or math.inf) else "not finished"
        if self.goodput.starts[-1].ended:
            return self.goodput.starts[-1].ended
        clock_s = [event.clock_s for event in self.events if event.run == self.events[-1].run]
        longest_gap_s = max((after - before for before, after in itertools.pairwise(clock_s)), default=0.0)
        is_recent = self.read_s - self.events[-1].time_s < max(_RUNNING_S, 3 * longest_gap_s)
        return "running" if is_recent else "killed"

    def state(self) -> str:
        """The status and step of the run, and why it ended."""
        total = "" if self.total_steps is None else f" of {self.total_steps:,}"
        text = f"{_STATUS_LABELS.get(self.status, self.status)}: step {self.step:,}{total}"
        if self.status in ("running", "killed"):
            return f"{text}, last event {format_duration(max(0.0, self.read_s - self.events[-1].time_s))} ago"
        why = self.goodput.starts[-1].why if self.events and self.status != "finished" else ""
        return f"{text} ({why})" if why else text


def gather(workdir: epath.PathLike, now_s: float | None = None) -> Facts:
    """Reads all facts of a run.

    Raises:
      UserError: when the folder has no run, or a file in it is damaged.
    """
    folder = epath.Path(workdir)
    check_folder(folder, "WORKDIR")
    if not is_remote(folder) and not folder.is_dir():
        raise UserError("no such folder", str(workdir), "Give the --workdir of a training run")
    lines = _metric_lines(folder / "metrics.jsonl") if has_metrics(folder) else []
    events = read_events(folder)
    config = read_bytes(folder / "config.txt").decode() if exists(folder / "config.txt") else ""
    if not lines and not events and not config:
        raise UserError("no run in this folder", str(workdir), "Give the --workdir of a training run")
    return Facts(
        workdir=printable(str(workdir), _MAX_LINE_CHARS),
        read_s=time.time() if now_s is None else now_s,
        training=[line for line in lines if "eval_loss" not in line],
        evaluation=[line for line in lines if "eval_loss" in line],
        events=events,
        goodput=compute_goodput(events),
        config=config,
        images=with_retries(lambda: _images(folder), folder),
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
            shown = printable(str(line)[:80])
            print_line(f"{path}: a line with an impossible step or value is skipped ({shown})", sys.stderr)
        else:
            lines.append(line)
    return lines


def _images(folder: epath.Path) -> dict[str, epath.Path]:
    """The newest PNGs, without those that a link leads to elsewhere, since the page is shared with others."""

    def is_own(path: epath.Path) -> bool:
        return not path.name.startswith(".") and (is_remote(path) or is_inside(path, folder))

    own = [path for path in folder.iterdir() if is_own(path)]
    parents = [folder, *(path for path in own if path.is_dir() and path.name not in _EXCLUDED_FOLDERS)]
    paths = [path for parent in parents for path in parent.iterdir() if is_own(path) and path.exists()]
    images = [path for path in paths if path.name.lower().endswith(".png") and path.name not in _EXCLUDED_IMAGES]
    ages = [(-path.stat().mtime, path) for path in images]
    newest = sorted(ages)[:_MAX_IMAGES]
    return {f"{printable(str(path.relative_to(folder)))}, {_date(-age)}": path for age, path in newest}


def summary(facts: Facts, max_rows: int = 40) -> str:
    """The report as text, with the newest starts and events."""
    return "\n\n".join(f"{title}\n{text}" for title, text in _sections(facts, max_rows).items())


def page(facts: Facts, max_rows: int = 1000) -> str:
    """The report as an HTML page, with the newest starts and events."""
    marks = collections.defaultdict(list)
    for event in facts.events:
        if event.kind in _DESCRIPTIONS or event.kind == "start":
            marks[event.kind].append(event.step)
    if facts.best_evaluation is not None:
        marks["best held-out loss"].append(facts.best_evaluation["step"])
    figure = curves_figure([*facts.training, *facts.evaluation], marks)
    sections = _sections(facts, max_rows) | {"Config": facts.config}
    figures = {} if figure is None else {"Metrics": figure}
    return render_page(epath.Path(facts.workdir).name or facts.workdir, sections, figures, facts.images)


def _sections(facts: Facts, max_rows: int) -> dict[str, str]:
    """Text of each section by title, without empty sections; its lines are safe to print on a terminal."""
    sections = {
        facts.workdir: _state(facts),
        "Metrics": _metrics(facts),
        "Time": _time(facts.goodput),
        "Starts": _starts(facts.goodput, max_rows),
        "Events": _events(facts.events, max_rows),
        "Data": _data(facts.training),
    }
    return {
        title: "\n".join(printable(line, _MAX_LINE_CHARS) for line in lines)
        for title, lines in sections.items()
        if lines
    }


def _state(facts: Facts) -> list[str]:
    """State, remedy, and identity: devices, config, versions and dates."""
    remedy = _STATUS_REMEDIES.get(facts.status, _START_AGAIN)
    lines = [facts.state(), remedy] if remedy else [facts.state()]
    starts = [event for event in facts.events if event.kind == "start"]
    if starts:
        lines.append(_filled("{devices} x {device_kind}, {processes} processes; config {config}", starts[-1]))
        lines.append(_filled("versions: {versions}", starts[-1]))
        first, last = _date(facts.goodput.starts[0].began_s), _date(facts.events[-1].time_s)
        lines.append(f"first start {first}, last event {last}, report {_date(facts.read_s)}")
    return lines


def _metrics(facts: Facts) -> list[str]:
    """Newest metrics, and those of the best evaluation."""
    named = [("training", line) for line in facts.training[-1:]]
    named += [("held out", line) for line in facts.evaluation[-1:]]
    if facts.best_evaluation is not None:
        named.append(("held out, best", facts.best_evaluation))
    if not named:
        return ["There are no metrics yet."]
    return [
        f"{label}, step {line['step']:,}: {_text({name: line[name] for name in line if _METRICS.fullmatch(name)})}"
        for label, line in named
    ]


def _time(report: GoodputReport) -> list[str]:
    """Goodput in time and in steps, both relative to what the save interval allows, and the time by class."""
    if not report.starts:
        return ["There is no events.jsonl, so starts and time are unknown."]
    if not report.total_s:
        return ["The run has just started."]
    lines = []
    if report.steps_goodput is not None:
        lost = report.lost_by_restarts + report.lost_by_rewinds
        lines.append(
            f"goodput: {report.goodput:.1%} of the time, and {report.steps_goodput:.1%} of the steps: of "
            f"{counted(report.kept_steps + lost, 'step')} done {lost:,} were done again, {report.lost_by_rewinds:,} "
            "of them after rewinds"
        )
    if report.expected is not None:
        lines.append(
            f"Expected, with half a save interval lost at each of {counted(report.failures, 'failure')}: "
            f"{report.expected.steps:.1%} of the steps, {report.expected.time:.1%} of the time. Of that the run "
            f"reached {report.expected.reached_steps:.1%} and {report.expected.reached_time:.1%}"
        )
    if report.max_unseen_steps:
        unseen = counted(report.max_unseen_steps, "more step")
        lines.append(f"Up to {unseen} may have been lost after the last events of killed starts")
    for kind, seconds in report.seconds.items():
        share = seconds / report.total_s
        bar = "#" * round(50 * share)
        lines.append(f"{kind:<10} {format_duration(seconds):>14} {share:>7.1%}  {bar}".rstrip())
    return lines


def _starts(report: GoodputReport, max_rows: int) -> list[str]:
    if not report.starts:
        return []
    lines = [f"{counted(len(report.starts), 'start')} in {format_duration(report.total_s)}"]
    for start in report.starts[-max_rows:]:
        end = (start.ended or "no end yet") + ("" if start.code is None else f" ({start.code})")
        why = f", {start.why}" if start.why else ""
        lines.append(
            f"{start.number:>4}  {_date(start.began_s)}  down {format_duration(start.down_s)} before, then steps "
            f"{start.from_step:,} to {start.to_step:,} in {format_duration(start.end_s - start.begin_s)}, "
            f"{start.lost:,} lost: {end}{why}"
        )
    return lines


def _events(events: Sequence[Event], max_rows: int) -> list[str]:
    notable = [event for event in events if event.kind in _DESCRIPTIONS]
    if not notable:
        return ["No events except starts, steps, saves and evaluations."] if events else []
    counts = collections.Counter(event.kind for event in notable)
    return [
        _text(counts),
        *(
            _filled(f"step {event.step:,}, {_date(event.time_s)}: {_DESCRIPTIONS[event.kind]}", event)
            for event in notable[-max_rows:]
        ),
    ]


def _data(training: Sequence[Mapping[str, Any]]) -> list[str]:
    """Number of examples by source, and of bad records by source and reason."""
    counts = collections.Counter()
    for line in training:
        counts.update({name: float(line[name] or 0) for name in line if name.startswith(("images/", "bad/"))})
    if not counts:
        return []
    total = sum(count for name, count in counts.items() if name.startswith("images/"))
    bad = sum(counts.values()) - total
    rows = [f"{name}: {count:,.0f}, {count / (total or 1.0):.2%}" for name, count in sorted(counts.items())]
    return [f"{total:,.0f} examples; {bad:,.0f} records could not be used", *rows]


def _filled(template: str, event: Event) -> str:
    """The template with the event's values; a value that the event lacks is a dash."""
    values = collections.defaultdict(lambda: "-", {name: _text(value) for name, value in event.values.items()})
    return template.format_map(values)


def _text(value: Any) -> str:
    """A value of a JSON file as text; versions of packages that are not installed are left out."""
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {_text(item)}" for name, item in value.items() if item != "none")
    if isinstance(value, list):
        return ", ".join(map(_text, value))
    if isinstance(value, float):
        return f"{value:,.1f}" if abs(value) >= 1000 else f"{value:.4g}"
    return "-" if value is None else f"{value:,}" if isinstance(value, int) else str(value)


def _date(time_s: float) -> str:
    """Date and time of seconds since 1970."""
    return datetime.fromtimestamp(max(0.0, time_s), UTC).strftime("%Y-%m-%d %H:%M:%S UTC")


@cli_main
def main(arguments: Sequence[str] | None = None) -> int:
    text, _, epilog = __doc__.partition("\n\n")
    parser = Parser(prog="python -m aimv2_jax.monitoring.report", description=text, epilog=epilog)
    parser.add_argument("workdir", metavar="WORKDIR", help="folder of a training run, or gs://BUCKET/...")
    parser.add_argument("--output", metavar="FILE.html", help="HTML page to write (default: WORKDIR/report.html)")
    flags = parser.parse_args(sys.argv[1:] if arguments is None else arguments)
    if flags.output is not None and not is_remote(flags.output):
        check_output(Path(flags.output), ".html")
    facts = gather(flags.workdir)
    print_line(summary(facts))
    output = flags.output or epath.Path(flags.workdir) / "report.html"
    atomic_write(output, page(facts).encode())
    print_line(f"\n{output}")
    return EXIT_FINISHED


if __name__ == "__main__":
    sys.exit(main())
