"""A run's report as text: its starts, where the time went, goodput, events and dropped records."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Sequence

from aimv2_jax.monitoring.goodput import GoodputReport
from aimv2_jax.monitoring.report_facts import (
    Facts,
    count_notable,
    describe_event,
    format_duration,
    format_number,
    format_percent,
    format_time,
    is_notable,
)
from aimv2_jax.plotting import counted

_LINE_CHARS = 100  # Width of wrapped text.


def summary(facts: Facts, max_starts: int = 40, max_events: int = 40) -> str:
    """The report as text, with the newest starts and events."""
    parts = [f"{facts.workdir}: {facts.state()}"]
    if facts.has_events:
        goodput = "\n".join(textwrap.fill(line, _LINE_CHARS) for line in describe_goodput(facts.report).splitlines())
        parts += [_starts(facts, max_starts), _time(facts.report), goodput, _events(facts, max_events)]
    else:
        parts.append("This run has no events.jsonl, so its starts and its time are unknown.")
    parts.append(_drops(facts))
    if facts.evaluation:
        last = facts.evaluation[-1]
        losses = "  ".join(f"{name[5:]} {format_number(last[name])}" for name in last if name.startswith("eval_"))
        parts.append(f"held out, step {last['step']:,}: {losses}")
    return "\n\n".join(part for part in parts if part)


def _starts(facts: Facts, max_rows: int) -> str:
    report = facts.report
    num_omitted = max(0, len(report.starts) - max_rows)
    head = f"{counted(len(report.starts), 'start')} in {format_duration(report.total_s)}" + (
        f"; the newest {max_rows}:" if num_omitted else ":"
    )
    rows = [("start", "began (UTC)", "down before", "steps", "lost", "lasted", "ended")]
    for start in report.starts[num_omitted:]:
        rows.append(
            (
                str(start.number),
                format_time(start.began_s),
                format_duration(start.down_s) if start.number > 1 else "",
                f"{start.from_step:,} to {start.to_step:,}",
                f"{start.lost:,}",
                format_duration(start.end_s - start.begin_s),
                describe_end(start.ended, start.code),
            )
        )
    return f"{head}\n{_table(rows, left=(1, 6))}"


def describe_end(ended: str, code: int | None) -> str:
    """How a start ended, with its exit code if there is one."""
    return (ended or "no end yet") + (f" ({code})" if code is not None else "")


def _time(report: GoodputReport) -> str:
    if not report.total_s:
        return ""
    rows = [("time", "", "")]
    rows += [
        (kind, format_duration(seconds), format_percent(seconds / report.total_s))
        for kind, seconds in report.seconds.items()
    ]
    rows.append(("all", format_duration(report.total_s), ""))
    return _table(rows, left=(0,))


def describe_goodput(report: GoodputReport) -> str:
    """Goodput in time and in steps, and relative to the save interval's expectation; "" if no step is done."""
    if report.goodput is None or report.steps_goodput is None:
        return ""
    lost = report.lost_by_restarts + report.lost_by_rewinds
    text = (
        f"goodput: {format_percent(report.goodput)} of the time, and {format_percent(report.steps_goodput)} "
        f"of the steps: of {counted(report.kept_steps + lost, 'step')} done {lost:,} were done again"
    )
    if report.lost_by_rewinds:
        text += f", {report.lost_by_rewinds:,} of them after rewinds"
    expected = report.expected
    if expected is not None:
        text += (
            ".\nExpected for the save interval, with half an interval lost at each of "
            f"{counted(report.failures, 'failure')}: {format_percent(expected.steps)} of the steps and, with restarts "
            f"as long as they were, {format_percent(expected.time)} of the time. Of that the run reached "
            f"{format_percent(expected.reached_steps)} in steps, {format_percent(expected.reached_time)} in time"
        )
    if report.max_unseen_steps:
        text += (
            f".\nUp to {counted(report.max_unseen_steps, 'more step')} may have been lost after the last events of "
            "killed starts" + ("; they count as lost in what was reached" if report.expected is not None else "")
        )
    return text + "."


def _events(facts: Facts, max_rows: int) -> str:
    counts = count_notable(facts)
    if not counts:
        return "No other events."
    head = "events: " + ", ".join(f"{name} {count:,}" for name, count in counts.items())
    notable = [event for event in facts.events if is_notable(event)]
    if len(notable) > max_rows:
        head += f"; the newest {max_rows}:"
    return "\n".join([head, *(f"  step {event.step:,}: {describe_event(event)}" for event in notable[-max_rows:])])


def _drops(facts: Facts) -> str:
    if not facts.examples_read:
        return ""
    total, bad = sum(facts.examples_read.values()), sum(facts.drops.values())
    if not bad:
        return f"data: {total:,} examples, no bad records"
    lines = [f"data: {total:,} examples; {bad:,} records could not be used:"]
    lines += [f"  {source}: {reason} {count:,}" for (source, reason), count in facts.drops.items()]
    return "\n".join(lines)


def _table(rows: Sequence[Sequence[str]], left: Iterable[int]) -> str:
    """Aligned columns; those in `left` are left-aligned, the others right-aligned."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    cells = [
        [cell.ljust(width) if i in left else cell.rjust(width) for i, (cell, width) in enumerate(zip(row, widths))]
        for row in rows
    ]
    return "\n".join("  ".join(row).rstrip() for row in cells)
