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

import base64
import collections
import dataclasses
import html
import io
import itertools
import math
import re
import string
import struct
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from etils import epath

from aimv2_jax.cli import Parser, check_output
from aimv2_jax.console import print_line
from aimv2_jax.errors import EXIT_FINISHED, UserError, cli_main
from aimv2_jax.monitoring.curves import curves_figure
from aimv2_jax.monitoring.events import Event, EventKind, read_events
from aimv2_jax.monitoring.goodput import GoodputReport, compute_goodput
from aimv2_jax.monitoring.metrics import format_duration, has_metrics, read_lines
from aimv2_jax.plotting import counted
from aimv2_jax.storage.files import atomic_write, check_folder, exists, is_remote, read_bytes, with_retries
from aimv2_jax.untrusted import as_int, as_number, is_inside, printable

_METRICS = re.compile("loss.*|lr|grad_norm|images_per_s|mfu|data_wait_fraction|eval_.*")
# Folders without images for people, and the curves of eval/visualize.py, of which the page draws newer ones.
_EXCLUDED = ("checkpoints", "compiled", "tensorboard", "profile", "wandb", "curves.png")
_MAX_IMAGES = 6
_MAX_IMAGE_BYTES = 2**23  # The largest figure of eval/ has less than 1 MiB.
_MAX_IMAGE_PIXELS = 25_000_000
_PNG_START = b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR"  # Followed by width and height.
_DOTS_PER_INCH = 160
_MAX_LINE_CHARS = 1000
_RUNNING_S = 300.0  # A run whose last event is more recent than this counts as running.

_START_AGAIN = "Start the same command again: it continues from the newest checkpoint."
_STATUSES = {  # Label and remedy. Any other status is its own label, and the remedy is to start again.
    "finished": ("finished", ""),
    "running": ("running", ""),
    "stopped": ("stopped on request", _START_AGAIN),
    "hung": ("ended after a hang", _START_AGAIN),
    "killed": ("no end was logged: killed, or it cannot reach its workdir", _START_AGAIN),
    "guard": ("stopped by a guard", "Find the cause in the events below before you start it again."),
    "error": ("error", "Fix what the message names, then start the same command again."),
    "bug": ("bug", "Report the traceback that the run printed."),
}
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
_TEMPLATE = string.Template("""<!DOCTYPE html>
<html lang="en">
<meta charset="utf-8">
<title>$title</title>
<style>
body { max-width: 980px; margin: 24px auto; padding: 0 24px; color: #222; font: 15px/1.5 system-ui, sans-serif; }
h1, h2 { margin: 28px 0 8px; font-size: 18px; overflow-wrap: anywhere; break-after: avoid; }
h1 { font-size: 26px; }
img { display: block; max-width: 100%; break-inside: avoid; }
pre { font: 13px/1.5 ui-monospace, Menlo, Consolas, monospace; white-space: pre-wrap; overflow-wrap: anywhere; }
</style>
<h1>$title</h1>
$sections
</html>
""")


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
    total_steps: int | None  # Steps that the config asks for; None if unknown.
    images: Mapping[str, bytes]  # The newest PNGs by caption; empty if they cannot be read.

    @property
    def step(self) -> int:
        """The last step in the metrics or the event log."""
        lines = [line["step"] for line in (*self.training[-1:], *self.evaluation[-1:])]
        return max([*lines, *(start.to_step for start in self.goodput.starts[-1:])], default=0)

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


def gather(workdir: epath.PathLike, now_s: float | None = None) -> Facts:
    """Reads all facts of a run; raises `UserError` if the folder has no run, or a file in it is damaged."""
    folder = epath.Path(workdir)
    check_folder(folder, "WORKDIR")
    if not is_remote(folder) and not folder.is_dir():
        raise UserError("no such folder", str(workdir), "Give the --workdir of a training run")
    lines = _metric_lines(folder / "metrics.jsonl") if has_metrics(folder) else []
    events = read_events(folder)
    config = read_bytes(folder / "config.txt").decode() if exists(folder / "config.txt") else ""
    if not lines and not events and not config:
        raise UserError("no run in this folder", str(workdir), "Give the --workdir of a training run")
    total_steps = re.search(r"^train\.steps = (\d{1,18})$", config, re.MULTILINE)
    return Facts(
        workdir=printable(str(workdir), _MAX_LINE_CHARS),
        read_s=time.time() if now_s is None else now_s,
        training=[line for line in lines if "eval_loss" not in line],
        evaluation=[line for line in lines if "eval_loss" in line],
        events=events,
        goodput=compute_goodput(events),
        config=config,
        total_steps=int(total_steps[1]) if total_steps else None,
        images={caption: _read_png(path) for caption, path in with_retries(lambda: _images(folder), folder).items()},
    )


def _metric_lines(path: epath.Path) -> list[dict[str, Any]]:
    """Reads the lines of metrics.jsonl; a line with an impossible value is skipped and logged."""
    lines = []
    for line in read_lines(path):
        try:
            as_int(line["step"], 0, 2**53)  # The limit of the event log.
            for value in line.values():
                if value is not None:
                    as_number(value, math.inf)
        except (ValueError, OverflowError):
            print_line(f"{path}: a line with an impossible value is skipped ({printable(str(line)[:80])})", sys.stderr)
        else:
            lines.append(line)
    return lines


def _images(folder: epath.Path) -> dict[str, epath.Path]:
    """The newest PNGs, without those that a link leads to elsewhere, since the page is shared with others."""

    def own(parent: epath.Path) -> list[epath.Path]:
        shown = [path for path in parent.iterdir() if not path.name.startswith(".") and path.name not in _EXCLUDED]
        return [path for path in shown if is_remote(path) or is_inside(path, folder)]

    parents = [folder, *(path for path in own(folder) if path.is_dir())]
    images = [path for parent in parents for path in own(parent) if path.name.lower().endswith(".png")]
    ages = [(-path.stat().mtime, path) for path in images if path.exists()]
    newest = sorted(ages)[:_MAX_IMAGES]
    return {f"{printable(str(path.relative_to(folder)))}, {_date(-age)}": path for age, path in newest}


def _read_png(path: epath.Path) -> bytes:
    """The bytes of a PNG of limited size; empty if it cannot be read."""
    try:
        if with_retries(path.stat, path).length > _MAX_IMAGE_BYTES:  # `read_bytes` has no limit in a bucket.
            return b""
        data = read_bytes(path, _MAX_IMAGE_BYTES)
        width, height = struct.unpack_from(">II", data, len(_PNG_START))
    except (OSError, ValueError, struct.error):
        return b""
    return data if data.startswith(_PNG_START) and width * height <= _MAX_IMAGE_PIXELS else b""


def summary(facts: Facts, max_rows: int = 40) -> str:
    """The report as text, with the newest starts and events."""
    return "\n\n".join(f"{title}\n{text}" for title, text in _sections(facts, max_rows))


def page(facts: Facts, max_rows: int = 1000) -> str:
    """The report as a self-contained HTML page without scripts, with the newest starts and events."""
    images = {"Metrics": _curves(facts)} | facts.images
    captions = [(title, "" if png else "The image cannot be read.") for title, png in facts.images.items()]
    parts = []
    for title, text in [*_sections(facts, max_rows), ("Config", facts.config), *captions]:
        parts.append(f"<h2>{html.escape(title)}</h2>")
        if images.get(title):
            data = base64.b64encode(images[title]).decode()
            parts.append(f'<img src="data:image/png;base64,{data}" alt="{html.escape(title)}">')
        if text:
            parts.append(f"<pre>{html.escape(text)}</pre>")
    name = html.escape(epath.Path(facts.workdir).name or facts.workdir)
    return _TEMPLATE.substitute(title=name, sections="\n".join(parts))


def _curves(facts: Facts) -> bytes:
    """A PNG of the metrics over steps with the events marked in it; empty if there are no metrics."""
    marks = collections.defaultdict(list)
    for event in facts.events:
        if event.kind in _DESCRIPTIONS or event.kind == EventKind.START:
            marks[event.kind].append(event.step)
    if facts.best_evaluation is not None:
        marks["best held-out loss"].append(facts.best_evaluation["step"])
    figure = curves_figure([*facts.training, *facts.evaluation], marks)
    file = io.BytesIO()
    if figure is not None:
        figure.savefig(file, format="png", dpi=_DOTS_PER_INCH)
    return file.getvalue()


def _sections(facts: Facts, max_rows: int) -> list[tuple[str, str]]:
    """Title and text of each section, without empty sections; all lines are safe to print on a terminal."""
    sections = (
        (facts.workdir, _state(facts)),
        ("Metrics", _metrics(facts)),
        ("Time", _time(facts.goodput)),
        ("Starts", _starts(facts.goodput, max_rows)),
        ("Events", _events(facts.events, max_rows)),
        ("Data", _data(facts.training)),
    )
    return [
        (title, "\n".join(printable(line, _MAX_LINE_CHARS) for line in lines if line))
        for title, lines in sections
        if lines
    ]


def _state(facts: Facts) -> list[str]:
    """Status, remedy, and identity: devices, config, versions and dates."""
    label, remedy = _STATUSES.get(facts.status, (facts.status, _START_AGAIN))
    total = "" if facts.total_steps is None else f" of {facts.total_steps:,}"
    state = f"{label}: step {facts.step:,}{total}"
    if facts.status in ("running", "killed"):
        state += f", last event {format_duration(max(0.0, facts.read_s - facts.events[-1].time_s))} ago"
    elif facts.status != "finished" and facts.events and facts.goodput.starts[-1].why:
        state += f" ({facts.goodput.starts[-1].why})"
    lines = [state, remedy]
    starts = [event for event in facts.events if event.kind == EventKind.START]
    if starts:
        lines.append(_filled("{devices} x {device_kind}, {processes} processes; config {config}", starts[-1]))
        lines.append(_filled("versions: {versions}", starts[-1]))
        first, last = _date(facts.goodput.starts[0].began_s), _date(facts.events[-1].time_s)
        lines.append(f"first start {first}, last event {last}, report {_date(facts.read_s)}")
    return lines


def _metrics(facts: Facts) -> list[str]:
    """Newest metrics, and those of the best evaluation."""
    best = [] if facts.best_evaluation is None else [facts.best_evaluation]
    shown = {"training": facts.training[-1:], "held out": facts.evaluation[-1:], "held out, best": best}
    return [
        f"{label}, step {line['step']:,}: {_text({name: line[name] for name in line if _METRICS.fullmatch(name)})}"
        for label, lines in shown.items()
        for line in lines
    ] or ["There are no metrics yet."]


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
    rows = [
        _filled(f"step {event.step:,}, {_date(event.time_s)}: {_DESCRIPTIONS[event.kind]}", event)
        for event in notable[-max_rows:]
    ]
    return [_text(collections.Counter(event.kind for event in notable)), *rows]


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
    return time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(max(0.0, time_s)))


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
