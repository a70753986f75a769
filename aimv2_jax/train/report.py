"""The story of a run: its restarts, what they cost, where the time went, and what else happened.

    python -m aimv2_jax.train.report WORKDIR [--output FILE.html]

Prints it, and writes one page with the curves, these events marked in them, and the newest pictures and results in the
workdir: WORKDIR/report.html, unless --output names another file. The page needs no network and no other file. A run at
work is not disturbed.

productive  steps that the run as it stands is built on; their share of all time is the goodput
lost        steps that were done again, after a restart or a rewind
start-up    from a process' start until its steps begin: imports, restoring, compilation
data        waiting for batches
evaluation  measuring held-out losses
saving      what steps waited for saves
down        from the last sign of a start until the next one begins
other       what is left, such as a hang
"""

from __future__ import annotations

import sys
import textwrap
from collections.abc import Iterable, Sequence
from pathlib import Path

from etils import epath

from aimv2_jax.drawing import counted
from aimv2_jax.errors import EXIT_FINISHED, reports_user_errors
from aimv2_jax.files import is_remote, write_whole
from aimv2_jax.flags import Parser, check_output
from aimv2_jax.train.goodput import Story
from aimv2_jax.train.report_facts import (
    Facts,
    counted_news,
    duration,
    gather,
    is_news,
    moment,
    number,
    percent,
    words,
)

_PAGE = "report.html"
_WIDTH = 100  # Letters of a line of prose.


def summary(facts: Facts, most_starts: int = 40, most_events: int = 40) -> str:
    """The story for a screen; of starts and events the newest."""
    parts = [f"{facts.workdir}: {facts.state()}"]
    if facts.has_books:
        told = "\n".join(textwrap.fill(line, _WIDTH) for line in goodput_words(facts.story).splitlines())
        parts += [_starts(facts, most_starts), _time(facts.story), told, _news(facts, most_events)]
    else:
        parts.append("This run has no events.jsonl, so nothing is known of its starts and its time.")
    parts.append(_drops(facts))
    if facts.evaluation:
        last = facts.evaluation[-1]
        told = "  ".join(f"{name[5:]} {number(last[name])}" for name in last if name.startswith("eval_"))
        parts.append(f"held out, step {last['step']:,}: {told}")
    return "\n\n".join(part for part in parts if part)


def _starts(facts: Facts, most: int) -> str:
    story = facts.story
    left_out = max(0, len(story.starts) - most)
    head = f"{counted(len(story.starts), 'start')} in {duration(story.total_s)}" + (
        f"; the newest {most}:" if left_out else ":"
    )
    rows = [("start", "began (UTC)", "down before", "steps", "lost", "lasted", "ended")]
    for start in story.starts[left_out:]:
        rows.append(
            (
                str(start.number),
                moment(start.began_s),
                duration(start.down_s) if start.number > 1 else "",
                f"{start.from_step:,} to {start.to_step:,}",
                f"{start.lost:,}",
                duration(start.end_s - start.begin_s),
                ended(start.ended, start.code),
            )
        )
    return f"{head}\n{_table(rows, left=(1, 6))}"


def ended(how: str, code: int | None) -> str:
    """How a start ended, with its exit code where there is one."""
    return (how or "no end yet") + (f" ({code})" if code is not None else "")


def _time(story: Story) -> str:
    if not story.total_s:
        return ""
    rows = [("time", "", "")]
    rows += [(kind, duration(seconds), percent(seconds / story.total_s)) for kind, seconds in story.seconds.items()]
    rows.append(("all", duration(story.total_s), ""))
    return _table(rows, left=(0,))


def goodput_words(story: Story) -> str:
    """Goodput in time and in steps, and against what the save interval allows; "" where no step is done."""
    if story.goodput is None or story.steps_goodput is None:
        return ""
    lost = story.lost_by_restarts + story.lost_by_rewinds
    text = (
        f"goodput: {percent(story.goodput)} of the time, and {percent(story.steps_goodput)} of the steps: of "
        f"{counted(story.kept_steps + lost, 'step')} done {lost:,} were done again"
    )
    if story.lost_by_rewinds:
        text += f", {story.lost_by_rewinds:,} of them after rewinds"
    allowed = story.allowed
    if allowed is not None:
        text += (
            ".\nWhat the save interval allows, with half an interval lost at each of "
            f"{counted(story.failures, 'failure')}: {percent(allowed.steps)} of the steps and, restarts as long as "
            f"they were, {percent(allowed.time)} of the time. Of that the run reached {percent(allowed.reached_steps)} "
            f"in steps, {percent(allowed.reached_time)} in time"
        )
    if story.unseen_most:
        text += (
            f".\nUp to {counted(story.unseen_most, 'step')} more may have been lost unseen after the last signs of "
            "killed starts" + (", and are counted in what was reached" if story.allowed is not None else "")
        )
    return text + "."


def _news(facts: Facts, most: int) -> str:
    counts = counted_news(facts)
    if not counts:
        return "Nothing else happened."
    head = "what happened: " + ", ".join(f"{name} {count:,}" for name, count in counts.items())
    news = [event for event in facts.events if is_news(event)]
    if len(news) > most:
        head += f"; the newest {most}:"
    return "\n".join([head, *(f"  step {event.step:,}: {words(event)}" for event in news[-most:])])


def _drops(facts: Facts) -> str:
    if not facts.read:
        return ""
    total, bad = sum(facts.read.values()), sum(facts.drops.values())
    if not bad:
        return f"data: {total:,} examples, none left out"
    lines = [f"data: {total:,} examples; {bad:,} records could not be used:"]
    lines += [f"  {source}: {reason} {count:,}" for (source, reason), count in facts.drops.items()]
    return "\n".join(lines)


def _table(rows: Sequence[Sequence[str]], left: Iterable[int]) -> str:
    """Columns of equal width; those in `left` begin at the left."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    cells = [
        [cell.ljust(width) if i in left else cell.rjust(width) for i, (cell, width) in enumerate(zip(row, widths))]
        for row in rows
    ]
    return "\n".join("  ".join(row).rstrip() for row in cells)


@reports_user_errors
def main(arguments: Sequence[str] | None = None) -> int:
    text, _, epilog = __doc__.partition("\n\n")
    parser = Parser(prog="python -m aimv2_jax.train.report", description=text, epilog=epilog)
    parser.add_argument("workdir", metavar="WORKDIR", help="of a training run, a folder or gs://BUCKET/...")
    parser.add_argument("--output", metavar="FILE.html", help=f"the page (default: WORKDIR/{_PAGE})")
    flags = parser.parse_args(sys.argv[1:] if arguments is None else arguments)
    if flags.output is not None and not is_remote(flags.output):
        check_output(Path(flags.output), ".html")
    facts = gather(flags.workdir)
    print(summary(facts))
    from aimv2_jax.train.report_page import page  # With matplotlib, which takes a second to load.

    output = flags.output or epath.Path(flags.workdir) / _PAGE
    write_whole(output, page(facts).encode())
    print(f"\n{output}")
    return EXIT_FINISHED


if __name__ == "__main__":
    sys.exit(main())
