"""HTML page of a run's report: one self-contained file without scripts, also suited for printing."""

from __future__ import annotations

import base64
import html
import io
import math
import warnings
from collections.abc import Iterable, Sequence

from etils import epath
from matplotlib.figure import Figure
from PIL import Image

from aimv2_jax.monitoring.report_facts import (
    Facts,
    count_notable,
    describe_event,
    event_label,
    format_duration,
    format_number,
    format_percent,
    format_time,
    image_bytes,
    is_notable,
)
from aimv2_jax.monitoring.report_figures import curves_figure, goodput_figure, timeline_figure
from aimv2_jax.monitoring.report_text import describe_end, describe_goodput
from aimv2_jax.plotting import counted

_DOTS_PER_INCH = 180  # Twice the display size.
_MAX_IMAGE_SIZE = (1400, 2800)  # Width and height in pixels.
_MAX_PIXELS = 25_000_000  # Of an image file; the largest that eval/ writes has 10 million.
_JPEG_QUALITY = 85
_MAX_VISIBLE_ROWS = 25  # Newest rows of a long table; older ones are collapsed.
_MAX_COLLAPSED_ROWS = 1000
_MAX_EVALUATIONS = 12

_STYLE = """
:root { color-scheme: light; }
* { box-sizing: border-box; }
body { margin: 0; background: #f4f5f7; color: #222; font: 15px/1.5 system-ui, "Segoe UI", "Helvetica Neue", Arial,
  "DejaVu Sans", sans-serif; }
main { max-width: 980px; margin: 0 auto; padding: 28px 32px 48px; background: #fff; }
h1 { margin: 0; font-size: 26px; line-height: 1.25; overflow-wrap: anywhere; }
h2 { margin: 34px 0 10px; font-size: 18px; border-bottom: 1px solid #dde1e6; padding-bottom: 4px; }
h3 { margin: 18px 0 6px; font-size: 15px; overflow-wrap: anywhere; }
p { margin: 8px 0; overflow-wrap: anywhere; }
.state { font-size: 17px; margin: 4px 0 2px; }
.note { color: #666; font-size: 13.5px; }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(150px, 1fr)); gap: 10px; margin: 18px 0 6px; }
.card { background: #f4f6f9; border-radius: 8px; padding: 10px 14px; }
.card b { display: block; font-size: 21px; line-height: 1.3; font-weight: 600; font-variant-numeric: tabular-nums; }
.card span { color: #666; font-size: 13px; }
img { max-width: 100%; height: auto; display: block; margin: 8px 0; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: 13.5px; font-variant-numeric: tabular-nums; }
th, td { padding: 4px 12px 4px 0; text-align: right; vertical-align: top; white-space: nowrap; }
th { color: #666; font-weight: 500; border-bottom: 1px solid #cfd4da; }
td { border-bottom: 1px solid #eceff2; }
th.text, td.text { text-align: left; }
.text:last-child { white-space: normal; overflow-wrap: anywhere; min-width: 13em; }
h3 .note { font-weight: normal; }
.beside { display: flex; flex-wrap: wrap; gap: 0 48px; }
.best td { font-weight: 600; }
details { margin: 10px 0; }
summary { cursor: pointer; color: #1f5fa8; }
pre { background: #f7f8fa; padding: 12px; font: 12px/1.45 ui-monospace, "DejaVu Sans Mono", Menlo, Consolas, monospace;
  white-space: pre-wrap; overflow-wrap: anywhere; border-radius: 6px; }
footer { margin-top: 36px; color: #777; font-size: 13px; }
@media print {
  body { background: #fff; font-size: 11pt; }
  main { max-width: none; padding: 0; }
  h2, h3 { break-after: avoid; }
  img, tr, .card { break-inside: avoid; }
}
@media (max-width: 600px) { main { padding: 16px; } }
"""


def render_page(facts: Facts) -> str:
    """Renders the page as HTML; all text from the run is escaped."""
    parts = [
        f"<h1>{_safe(facts.name)}</h1>",
        f'<p class="state">{_safe(_capital(facts.state()))}</p>',
        f'<p class="note">{_safe(facts.workdir)}, read {format_time(facts.written_s)} UTC</p>',
        _cards(facts),
        _goodput(facts),
        _curves(facts),
        _events(facts),
        _starts(facts),
        _evaluations(facts),
        _results(facts),
        _images(facts),
        _drops(facts),
        _config(facts),
        "<footer>Written by python -m aimv2_jax.monitoring.report</footer>",
    ]
    body = "\n".join(part for part in parts if part)
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{_safe(facts.name)}: {_safe(facts.state())}</title>\n<style>{_STYLE}</style>\n</head>\n"
        f"<body>\n<main>\n{body}\n</main>\n</body>\n</html>\n"
    )


def _cards(facts: Facts) -> str:
    report = facts.report
    cards = []
    total = f" of {facts.total_steps:,}" if facts.total_steps is not None else ""
    cards.append((f"{facts.newest_step:,}", f"steps done{total}"))
    if report.starts:
        cards.append((format_percent(report.goodput), "goodput: productive time"))
        cards.append((format_duration(report.total_s), "since the first start"))
        cards.append((f"{len(report.starts) - 1:,}", "restarts"))
        cards.append((f"{report.lost_by_restarts + report.lost_by_rewinds:,}", "steps done again"))
    for lines, key, name in (
        (facts.training, "loss", "training loss"),
        (facts.evaluation, "eval_loss", "held-out loss"),
    ):
        known = [line for line in lines if line.get(key) is not None]
        if known:
            cards.append((format_number(known[-1][key]), f"{name}, step {known[-1]['step']:,}"))
    speeds = [line["images_per_s"] for line in facts.training[-10:] if line.get("images_per_s")]
    if speeds:
        cards.append((f"{sum(speeds) / len(speeds):,.0f}", "images per second, recent mean"))
    if facts.examples_read:
        cards.append((f"{sum(facts.drops.values()):,}", "bad records skipped"))
    inner = "".join(f'<div class="card"><b>{_safe(value)}</b><span>{_safe(name)}</span></div>' for value, name in cards)
    return f'<div class="cards">{inner}</div>'


def _goodput(facts: Facts) -> str:
    report = facts.report
    if not facts.has_events:
        return "<h2>Time</h2><p>This run has no events.jsonl, so its starts and its time are unknown.</p>"
    if not report.total_s:
        return "<h2>Time</h2><p>The run has just started.</p>"
    text = "".join(f"<p>{_safe(_capital(line))}</p>" for line in describe_goodput(report).splitlines())
    first = format_time(report.starts[0].began_s)
    return (
        f"<h2>Time</h2>{_image_tag(timeline_figure(report), 'Shares of the run&#39;s time by class, over time')}"
        f'<p class="note">First start: {first} UTC. Each column is a time interval, divided by class.</p>'
        f"{_image_tag(goodput_figure(report), 'Time by class, and actual and expected goodput')}{text}"
    )


def _curves(facts: Facts) -> str:
    figure = curves_figure(facts)
    if figure is None:
        return "<h2>Curves</h2><p>There are no metrics yet.</p>"
    note = ""
    if facts.events:
        note = '<p class="note">Marks and lines: events at that step. Shaded: batches that were skipped.</p>'
    return f"<h2>Curves</h2>{_image_tag(figure, 'Losses, learning rate, gradient norm and speed over steps')}{note}"


def _evaluations(facts: Facts) -> str:
    lines = facts.evaluation
    if not lines:
        return ""
    names = list(dict.fromkeys(name for line in lines for name in line if name.startswith("eval_")))
    known = [line for line in lines if line["eval_loss"] is not None]
    best = min(known, key=lambda line: line["eval_loss"]) if known else None
    shown = list(lines[-_MAX_EVALUATIONS:])
    if best is not None and best not in shown:
        shown.insert(0, best)
    rows = [[f"{line['step']:,}", *(format_number(line.get(name)) for name in names)] for line in shown]
    head = ["step", *(name.removeprefix("eval_").replace("_", " ") for name in names)]
    bold = [index for index, line in enumerate(shown) if line is best]
    note = f"{counted(len(lines), 'evaluation')}, the newest {len(lines[-_MAX_EVALUATIONS:])} shown; the best is bold."
    return f'<h2>Held-out losses</h2>{_table(head, rows, best=bold)}<p class="note">{note}</p>'


def _results(facts: Facts) -> str:
    if not facts.results:
        return ""
    parts = ['<h2>Evaluations and probes</h2><div class="beside">']
    for result in facts.results:
        rows = [[name, value] for name, value in result.figures.items()]
        table = _table((), rows, text=(0,))
        parts.append(
            f'<div><h3>{_safe(_capital(result.what))}</h3>{table}<p class="note">{_safe(result.file)}</p></div>'
        )
    return "".join([*parts, "</div>"])


def _images(facts: Facts) -> str:
    parts = []
    for name, path, written_s in facts.images:
        source = _image_url(path)
        content = f'<img src="{source}" alt="{_safe(name)}">' if source else "<p>The image cannot be read.</p>"
        parts.append(f'<h3>{_safe(name)} <span class="note">{format_time(written_s)} UTC</span></h3>{content}')
    return f"<h2>Newest images</h2>{''.join(parts)}" if parts else ""


def _image_url(path: epath.Path) -> str | None:
    """A downscaled image as a data URL; None if it cannot be read."""
    try:
        # Only PNG, whatever the file name: Pillow passes PostScript to Ghostscript, which executes it.
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            with Image.open(io.BytesIO(image_bytes(path)), formats=("PNG",)) as image:
                if math.prod(image.size) > _MAX_PIXELS:
                    return None
                rgba = image.convert("RGBA")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        return None
    rgba.thumbnail(_MAX_IMAGE_SIZE, Image.Resampling.LANCZOS)
    flat = Image.new("RGB", rgba.size, "white")
    flat.paste(rgba, mask=rgba.getchannel("A"))
    file = io.BytesIO()
    flat.save(file, "JPEG", quality=_JPEG_QUALITY, optimize=True)
    return _data_url("image/jpeg", file.getvalue())


def _starts(facts: Facts) -> str:
    starts = facts.report.starts
    if not starts:
        return ""
    head = ("start", "began (UTC)", "down before", "steps", "done again", "lasted", "productive", "ended")
    rows = [
        (
            f"{start.number:,}",
            format_time(start.began_s),
            format_duration(start.down_s) if start.number > 1 else "",
            f"{start.from_step:,} to {start.to_step:,}",
            f"{start.lost:,}",
            format_duration(start.end_s - start.begin_s),
            format_percent(start.seconds["productive"] / (start.end_s - start.begin_s))
            if start.end_s > start.begin_s
            else "-",
            describe_end(start.ended, start.code) + (f": {start.why}" if start.why else ""),
        )
        for start in starts
    ]
    return f"<h2>Starts</h2>{_folded(head, rows, text=(7,))}"


def _events(facts: Facts) -> str:
    if not facts.has_events:
        return ""
    notable = [event for event in facts.events if is_notable(event)]
    if not notable:
        return "<h2>Events</h2><p>No events except starts, steps, saves and evaluations.</p>"
    counts = ", ".join(f"{name} {count:,}" for name, count in count_notable(facts).items())
    rows = [
        (f"{event.step:,}", format_time(event.time_s), _capital(event_label(event.kind)), describe_event(event))
        for event in notable
    ]
    table = _folded(("step", "time (UTC)", "event", "details"), rows, text=(2, 3))
    return f"<h2>Events</h2><p>{_safe(_capital(counts))}.</p>{table}"


def _drops(facts: Facts) -> str:
    if not facts.examples_read:
        return ""
    total, bad = sum(facts.examples_read.values()), sum(facts.drops.values())
    parts = [f"<h2>Data</h2><p>{total:,} examples were trained on; {bad:,} records could not be used.</p>"]
    sources = sorted({*facts.examples_read, *(source for source, _ in facts.drops)})
    reasons = sorted({reason for _, reason in facts.drops})
    rows = [
        [
            source,
            f"{facts.examples_read.get(source, 0):,}",
            *(f"{facts.drops.get((source, reason), 0):,}" for reason in reasons),
        ]
        for source in sources
    ]
    parts.append(_table(("source", "examples", *(reason.replace("_", " ") for reason in reasons)), rows, text=(0,)))
    if facts.bad_records:
        rows = [
            [f"{line['step']:,}", *(str(line.get(name)) for name in ("source", "record", "key", "reason"))]
            for line in facts.bad_records
        ]
        parts.append("<h3>Newest bad records</h3>")
        parts.append(_table(("step", "source", "record", "key", "reason"), rows, text=(1, 3, 4)))
    return "".join(parts)


def _config(facts: Facts) -> str:
    if facts.config is None:
        return ""
    return f"<h2>Config</h2><details><summary>All keys</summary><pre>{_safe(facts.config)}</pre></details>"


def _folded(head: Sequence[str], rows: Sequence[Sequence[str]], text: Sequence[int]) -> str:
    """A table whose older rows are collapsed if there are many."""
    older, newest = rows[:-_MAX_VISIBLE_ROWS], rows[-_MAX_VISIBLE_ROWS:]
    if not older:
        return _table(head, rows, text)
    num_omitted = len(older) - _MAX_COLLAPSED_ROWS
    omitted = f", {num_omitted:,} still older rows omitted" if num_omitted > 0 else ""
    title = f"{min(len(older), _MAX_COLLAPSED_ROWS):,} older rows{omitted}"
    collapsed = _table(head, older[-_MAX_COLLAPSED_ROWS:], text)
    return f"{_table(head, newest, text)}<details><summary>{title}</summary>{collapsed}</details>"


def _table(
    head: Sequence[str], rows: Iterable[Sequence[str]], text: Sequence[int] = (), best: Sequence[int] = ()
) -> str:
    """An HTML table; columns in `text` are left-aligned, rows in `best` are bold."""

    def cells(tag: str, row: Sequence[str]) -> str:
        left = ' class="text"'
        return "".join(f"<{tag}{left if i in text else ''}>{_safe(cell)}</{tag}>" for i, cell in enumerate(row))

    bold = ' class="best"'
    lines = [f"<tr{bold if i in best else ''}>{cells('td', row)}</tr>" for i, row in enumerate(rows)]
    if head:
        lines.insert(0, f"<tr>{cells('th', head)}</tr>")
    return f'<div class="wide"><table>{"".join(lines)}</table></div>'


def _image_tag(figure: Figure, text: str) -> str:
    """The figure as an inline PNG with the alternative text `text`."""
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=_DOTS_PER_INCH)
    return f'<img src="{_data_url("image/png", file.getvalue())}" alt="{text}">'


def _data_url(kind: str, data: bytes) -> str:
    return f"data:{kind};base64,{base64.b64encode(data).decode('ascii')}"


def _safe(text: str) -> str:
    return html.escape(text, quote=True)


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]
