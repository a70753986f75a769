"""A run's report: the text, and a self-contained page that escapes all untrusted input."""

from __future__ import annotations

import base64
import io
import json
import os
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from PIL import Image

from aimv2_jax.errors import EXIT_FINISHED, EXIT_USER
from aimv2_jax.monitoring import report
from aimv2_jax.monitoring.curves import curves_figure
from aimv2_jax.monitoring.events import EventKind, EventLog
from aimv2_jax.monitoring.report import gather, page, summary
from aimv2_jax.storage.files import atomic_write, read_bytes

HOSTILE = "<script>alert(1)</script>\"'&"
NOW_S = 5000.0
START = dict(processes=1, devices=8, device_kind="cpu", config="ab", steps=40, save_every=10, versions={"jax": HOSTILE})
VOID = ("meta", "img", "br", "hr", "link", "input")


class RecordedRun:
    """Records the events of starts whose steps take 2 s each."""

    def __init__(self, workdir):
        self.workdir, self.now_s = workdir, 1000.0
        (workdir / "config.txt").write_text(f"train.steps = 40\ndata.sources.a = {HOSTILE!r}\n")

    def __call__(self):
        return self.now_s

    def start(self, first, last, *more, code=None):
        with EventLog(self.workdir, clock=self, wall=self) as events:
            events.write("start", first, **START)
            self.now_s += 20
            events.write("compiled", first, seconds=20)
            begin_s = self.now_s
            for step in range(first + 1, last + 1):
                self.now_s += 2
                sums = dict(step_s=self.now_s - begin_s, data_s=0.0, evaluation_s=0.0, saving_s=0.0)
                events.write("progress", step, **sums)
            for kind, values in more:
                events.write(kind, last, **values)
            if code is not None:
                events.write("stop", last, code=code, why=HOSTILE if code else "")
        self.now_s += 10


# One event of each notable kind.
NOTABLE = {
    "damaged": dict(files=["state/d/0", HOSTILE], moved_to="damaged/20"),
    "save_failed": dict(why=HOSTILE),
    "preemption": {},
    "nonfinite": dict(loss=None, grad_norm=float("inf"), file="nonfinite/17.npz"),
    "spike": dict(values={"loss": 9.0, "mean": 1.5}, action="log"),
    "skip": dict(a=17, b=20, why="--skip_examples"),
    "rewind": dict(from_step=17, to_step=10, a=12, b=17),
    "data_changed": dict(what=["data source 'photo': 60 records before, 50 now", HOSTILE]),
    "bad_data": dict(counts={"corrupt_record": 2}),
    "hang": dict(what="data", file="hang.txt"),
    "device_failure": dict(status=HOSTILE, file="hangs/17.txt"),
    "worker_restarted": dict(what="died with exit code -9", at=HOSTILE),
    "corruption": dict(leaf="encoder/norm", device="cpu:1", host="here"),
}


def write_metrics(folder, last=40):
    with (folder / "metrics.jsonl").open("w") as file:
        for step in range(1, last + 1):
            loss = None if step == 7 else 5 / step
            line = {"step": step, "loss": loss, "loss_image": 0.5, "lr": 1e-3, "grad_norm": 1.0}
            line |= {"images_per_s": 100.0, "mfu": 0.41, "images/photos": 8} | (
                {"bad/photos/corrupt_record": 2} if step == 17 else {}
            )
            file.write(json.dumps(line) + "\n")
            if step % 20 == 0:
                file.write(json.dumps({"step": step, "eval_loss": 0.1 * step, "eval_loss_image": 0.6}) + "\n")


@pytest.fixture(autouse=True)
def coarse(monkeypatch):
    """Figures of low resolution, which are faster to write."""
    monkeypatch.setattr(report, "_DOTS_PER_INCH", 40)


@pytest.fixture
def run(tmp_path):
    """A run killed at 17 and finished at 40, with all kinds of events, and metrics."""
    workdir = tmp_path / "my run"
    workdir.mkdir()
    events = RecordedRun(workdir)
    events.start(0, 17, *[(kind, values) for kind, values in NOTABLE.items() if kind not in ("hang", "rewind")])
    events.start(10, 40, code=0)
    write_metrics(workdir)
    return workdir


def parse(text):
    """Checks that every tag is closed and nothing is external; returns (all text, sources of the images)."""

    class Parser(HTMLParser):
        def __init__(self):
            super().__init__(convert_charrefs=True)
            self.open_tags = []
            self.text = []
            self.images = []
            self.tags = []

        def handle_starttag(self, tag, attributes):
            self.tags.append(tag)
            if tag not in VOID:
                self.open_tags.append(tag)
            for name, value in attributes:
                assert not name.startswith("on"), (tag, name)
                if name in ("src", "href", "action", "data"):
                    assert value.startswith("data:image/"), (tag, name, value[:80])
                    self.images.append(value)

        def handle_endtag(self, tag):
            assert self.open_tags.pop() == tag

        def handle_data(self, data):
            self.text.append(data)

    parser = Parser()
    parser.feed(text)
    parser.close()
    assert parser.open_tags == [] and {"script", "link", "iframe"}.isdisjoint(parser.tags)
    assert text.startswith("<!DOCTYPE html>") and "http:" not in text and "https:" not in text
    assert "@import" not in text and "url(" not in text
    return "\n".join(parser.text), parser.images


def state_line(facts):
    """The line below the name of the workdir."""
    return summary(facts).splitlines()[1]


def decode(source):
    return Image.open(io.BytesIO(base64.b64decode(source.partition(",")[2])))


def test_every_notable_event_is_described(run):
    """Text and page describe each notable event, with its remedy, and count the kinds; routine kinds are left out."""
    facts = gather(run, NOW_S)
    for text in (summary(facts), parse(page(facts))[0]):
        for part in (
            f"checkpoint is damaged: state/d/0, {HOSTILE}; moved to damaged/20. Check the disk",
            "loss - or gradient norm - is not finite: update skipped; input of a replay: nonfinite/17.npz",
            "spike: loss 9, mean 1.5; log. If spikes recur, set guard.spike",
            "batches 17:20 skipped: --skip_examples",
            "and all workers were restarted; it " + HOSTILE,
            "encoder/norm on cpu:1",
            "continued with changed data, as accepted: data source 'photo': 60 records before, 50 now",
            "bad records skipped: corrupt_record 2",
        ):
            assert part in text
    routine = {"start", "compiled", "restore", "save", "evaluation", "progress", "stop"}
    assert routine | set(NOTABLE) == set(EventKind)
    counts = ", ".join(f"{kind} 1" for kind in NOTABLE if kind not in ("hang", "rewind"))
    assert f"Events\n{counts}\n" in summary(facts)


def test_summary_has_every_fact(run):
    """The text has state, identity, metrics, time by class, goodput, starts and data of a run killed once."""
    text = summary(gather(run, NOW_S))
    for line in (
        "finished: step 40 of 40",
        "8 x cpu, 1 processes; config ab",
        f"versions: jax {HOSTILE}",
        "first start 1970-01-01 00:16:40 UTC, last event 1970-01-01 00:19:04 UTC, report 1970-01-01 01:23:20 UTC",
        "training, step 40: loss 0.125, loss_image 0.5, lr 0.001, grad_norm 1, images_per_s 100, mfu 0.41",
        "held out, step 40: eval_loss 4, eval_loss_image 0.6",
        "held out, best, step 20: eval_loss 2, eval_loss_image 0.6",
        # 40 of 47 steps are productive; with half of ten lost at the failure it would be 40 of 45.
        "goodput: 55.6% of the time, and 85.1% of the steps: of 47 steps done 7 were done again, "
        "0 of them after rewinds",
        "Expected, with half a save interval lost at each of 1 failure: 88.9% of the steps, 57.1% of the time. "
        "Of that the run reached 95.7% and 97.2%",
        f"productive     1 min 20 s   55.6%  {'#' * 28}",
        "lost                 14 s    9.7%  #####",
        "down                 10 s    6.9%  ###",
        "2 starts in 2 min 24 s",  # 20 + 34, 10 down, 20 + 60.
        "   1  1970-01-01 00:16:40 UTC  down 0 s before, then steps 0 to 17 in 54 s, 7 lost: killed",
        "   2  1970-01-01 00:17:44 UTC  down 10 s before, then steps 10 to 40 in 1 min 20 s, 0 lost: finished (0)",
        "320 examples; 2 records could not be used",
        "bad/photos/corrupt_record: 2, 0.62%",
        "images/photos: 320, 100.00%",
    ):
        assert f"\n{line}\n" in f"{text}\n"


def test_best_evaluation_is_that_of_checkpoints(tmp_path):
    """Averaged parameters count where the run has them, and a missing loss never does."""
    losses = [(1.0, 3.0), (2.0, 2.0), (None, None), (0.5, 4.0)]
    lines = [{"step": 10 * i, "eval_loss": a, "eval_loss_ema": b} for i, (a, b) in enumerate(losses)]
    (tmp_path / "metrics.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    assert gather(tmp_path).best_evaluation["step"] == 10


def test_page_is_complete_and_escaped(run):
    """The page has all sections, the curves and the images of the run's folders, and escapes names and values."""
    (run / "show").mkdir()
    Image.new("RGB", (300, 90)).save(run / "show/predictions.png")
    (run / "show/broken.png").write_bytes(b"none")
    (run / "show/curves.png").write_bytes(b"none")
    (run / "checkpoints").mkdir()
    (run / "checkpoints/not_this.png").write_bytes(b"none")
    (run / f"{HOSTILE.replace('/', '')}.png").write_bytes(b"none")
    text = page(gather(run, NOW_S))
    words, images = parse(text)
    assert text.count(HOSTILE) == 0 and "&lt;script&gt;alert(1)" in text
    assert f"data.sources.a = {HOSTILE!r}" in words and HOSTILE in words
    for part in ("my run", "finished: step 40 of 40", "55.6%", "show/predictions.png", "held out, best, step 20"):
        assert part in words
    assert words.count("The image cannot be read.") == 2 and "not_this" not in words and "curves.png" not in words
    assert decode(images[0]).format == "PNG" and decode(images[1]).size == (300, 90) and len(images) == 2


def test_curves_have_a_panel_for_each_metric(run):
    """Panels have all curves of their metrics, and the legend names the marked steps."""
    facts = gather(run)
    figure = curves_figure([*facts.training, *facts.evaluation], {"spike": [17], "start": list(range(100))})
    panels = {axes.get_title(loc="left"): axes for axes in figure.axes}
    titles = ["Loss", "Image loss", "Gradient norm", "Learning rate", "Images per second", "Model FLOPs utilisation"]
    assert list(panels) == titles
    assert [text.get_text() for text in panels["Loss"].get_legend().get_texts()] == ["loss", "eval_loss"]
    assert np.isnan(panels["Loss"].lines[0].get_ydata()[6])  # A loss that is not finite is a gap.
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["spike", "start"]


@pytest.mark.parametrize(("highest", "scale"), [(2.9, "linear"), (30.0, "log")])
def test_gradient_norm_has_labelled_ticks(highest, scale):
    """The axis of the gradient norm has at least two labels, whether its values are close or decades apart."""
    lines = [{"step": step, "grad_norm": value} for step, value in enumerate((1.5, highest, 2.0))]
    figure = curves_figure(lines, {})
    FigureCanvasAgg(figure).draw()
    [axes] = figure.axes
    low, high = axes.get_ylim()
    labels = [label for which in ("major", "minor") for label in axes.get_yticklabels(which=which)]
    shown = [label for label in labels if label.get_text() and low <= label.get_position()[1] <= high]
    assert axes.get_yscale() == scale and len(shown) >= 2


def test_page_without_events_shows_the_curves(run):
    """A run without an event log gets a page that says so, with the curves."""
    (run / "events.jsonl").unlink()
    facts = gather(run, NOW_S)
    words, images = parse(page(facts))
    assert "no events.jsonl" in words and "no events.jsonl" in summary(facts) and len(images) == 1
    assert state_line(facts) == "finished: step 40 of 40"


def test_page_without_metrics_has_no_curves(tmp_path):
    """A run with an event log alone gets a page without curves."""
    RecordedRun(tmp_path).start(0, 5)
    words, images = parse(page(gather(tmp_path, NOW_S)))
    assert "There are no metrics yet." in words and not images


def test_page_of_a_run_that_just_started(tmp_path):
    """A log of one event gives a complete page, and the run counts as running."""
    with EventLog(tmp_path, clock=lambda: 0.0) as events:
        events.write("start", 0, **START)
    facts = gather(tmp_path)
    assert "The run has just started." in parse(page(facts))[0]
    assert "running: step 0" in summary(facts)


@pytest.mark.parametrize(
    "code, later_s, state, remedy",
    [
        (None, 60, "running: step 17 of 40, last event 1 min 00 s ago", "8 x cpu"),
        (
            None,
            86400,
            "no end was logged: killed, or it cannot reach its workdir: step 17 of 40, last event 1 d 00 h ago",
            "Start the same command again",
        ),
        (75, 60, f"stopped on request: step 17 of 40 ({HOSTILE})", "Start the same command again"),
        (3, 60, f"stopped by a guard: step 17 of 40 ({HOSTILE})", "Find the cause in the events below"),
        (1, 60, f"bug: step 17 of 40 ({HOSTILE})", "Report the traceback"),
    ],
)
def test_state_and_remedy_of_the_last_end(tmp_path, code, later_s, state, remedy):
    """The state says how the last start ended and why, and the next line what to do."""
    events = RecordedRun(tmp_path)
    events.start(0, 17, code=code)
    facts = gather(tmp_path, events.now_s - 10 + later_s)
    assert state_line(facts) == state and f"{state}\n{remedy}" in summary(facts)


def test_state_of_a_workdir_named_as_a_section(tmp_path, monkeypatch):
    """A relative workdir with the name of a section, such as Time, has its own section."""
    monkeypatch.chdir(tmp_path)
    Path("Time").mkdir()
    RecordedRun(Path("Time")).start(0, 17, code=0)
    facts = gather("Time")
    assert state_line(facts) == "finished: step 17 of 40"
    for text in (summary(facts), parse(page(facts))[0]):
        assert "finished: step 17 of 40" in text and "goodput: " in text


def test_state_of_a_hung_run(tmp_path):
    """The state names what the run waited for when it hung."""
    RecordedRun(tmp_path).start(0, 17, ("hang", NOTABLE["hang"]))
    assert state_line(gather(tmp_path)) == "ended after a hang: step 17 of 40 (waiting for data)"


def test_report_of_many_starts_has_the_newest(tmp_path):
    """Old starts are counted but not listed, so that the report stays small."""
    events = RecordedRun(tmp_path)
    for _ in range(300):
        events.start(0, 2)
    facts = gather(tmp_path)
    text = summary(facts)
    assert "300 starts in " in text and "\n 261  1970" in text and "\n 260  1970" not in text
    assert len(page(facts, max_rows=100)) < 1e5


def test_command_prints_and_writes_one_file(run, capsys):
    """The command prints the text and its output, and changes no other file of the run."""
    before = {path: path.read_bytes() for path in run.iterdir()}
    assert report.main([str(run)]) == EXIT_FINISHED
    printed = capsys.readouterr().out
    assert "goodput: 55.6%" in printed and printed.endswith(f"{run / 'report.html'}\n")
    assert {path: path.read_bytes() for path in run.iterdir() if path.name != "report.html"} == before
    parse((run / "report.html").read_text(encoding="utf-8"))
    assert report.main([str(run), "--output", str(run / "other.html")]) == EXIT_FINISHED
    assert (run / "other.html").exists()


def test_page_takes_pngs_only_whatever_a_name_says(tmp_path):
    """A file that is named .png but is no PNG is not embedded."""
    write_metrics(tmp_path)
    Image.new("RGB", (100, 100)).save(tmp_path / "pretty.eps")
    (tmp_path / "pretty.eps").rename(tmp_path / "pretty.png")
    words, images = parse(page(gather(tmp_path)))
    assert "pretty.png" in words and "The image cannot be read." in words and len(images) == 1  # The curves.


def test_page_skips_pipes_links_and_large_images(tmp_path):
    """Images outside the run are not shown; pipes and images of too many pixels are named, not read."""
    run = tmp_path / "run"
    run.mkdir()
    write_metrics(run)
    os.mkfifo(run / "pipe.png")
    Image.new("RGB", (8, 8)).save(tmp_path / "secret.png")
    (run / "link.png").symlink_to("../secret.png")
    (run / "gone.png").symlink_to("none.png")
    (run / "folder").symlink_to("..")
    Image.new("1", (6000, 6000)).save(run / "bomb.png")
    words, images = parse(page(gather(run)))
    assert not any(name in words for name in ("link.png", "gone.png", "secret.png"))
    assert words.count("The image cannot be read.") == 2  # The pipe and the bomb.
    assert len(images) == 1  # The curves.


_HEAD = {"kind": "start", "step": 0, "time": 1.0, "clock": 1.0, "run": "a"}


@pytest.mark.parametrize(
    "file, line",
    [
        ("metrics.jsonl", {"step": 10**22, "loss": 1.0}),
        ("metrics.jsonl", {"step": 2**60, "loss": 1.0}),
        ("metrics.jsonl", {"step": 1, "loss": "text"}),
        ("metrics.jsonl", {"step": 1, "images/a": [1]}),
        ("events.jsonl", _HEAD | {"time": 1e300}),
        ("events.jsonl", _HEAD | {"step": 10**22}),
        ("events.jsonl", _HEAD | {"save_every": "text"}),
        ("events.jsonl", _HEAD | {"kind": "progress", "step_s": "text"}),
        ("events.jsonl", _HEAD | {"kind": "rewind", "from_step": 3}),
        ("events.jsonl", '{"kind": "start", "step": 0, "time": NaN, "clock": 1, "run": "a"}'),
        ("events.jsonl", '{"kind": ' + "[" * 100_000 + "]" * 100_000 + "}"),
    ],
)
def test_report_of_lines_that_no_run_writes_names_them(tmp_path, capsys, file, line):
    """The report is written without them."""
    write_metrics(tmp_path)
    with (tmp_path / file).open("a") as lines:
        lines.write((line if isinstance(line, str) else json.dumps(line)) + "\n")
    assert report.main([str(tmp_path)]) == EXIT_FINISHED
    error = capsys.readouterr().err
    assert str(tmp_path / file) in error and "skipped" in error and error.count("\n") == 1


def test_summary_has_no_control_characters(tmp_path):
    """Values of events cannot move the cursor, set a title or begin a line."""
    events = RecordedRun(tmp_path)
    events.start(0, 2, ("save_failed", dict(why="\x1b]0;PWNED\x07\x1b[2J\r\nfinished: step 2 of 2")))
    text = summary(gather(tmp_path))
    assert "\x1b" not in text and "\r" not in text and "\nfinished" not in text
    assert r"\x1b]0;PWNED\x07" in text


@pytest.mark.parametrize(
    "make, flags, message",
    [
        (lambda folder: None, [], "no run in this folder"),
        (lambda folder: folder.rmdir(), [], "no such folder"),
        (write_metrics, ["--output", "page.txt"], "--output: the name does not end in .html"),
        (write_metrics, ["--output", "no/such/page.html"], "--output: no such folder"),
    ],
)
def test_command_user_errors(tmp_path, capsys, make, flags, message):
    """A folder without a run or an output that cannot be written gives one sentence and exit code 2."""
    folder = tmp_path / "run"
    folder.mkdir()
    make(folder)
    assert report.main([str(folder), *flags]) == EXIT_USER
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_command_run_in_bucket(run, gcs_folder):
    """The report of a run in a bucket is read and written there."""
    Image.new("RGB", (8, 8)).save(run / "captions.png")
    for file in filter(Path.is_file, run.rglob("*")):
        atomic_write(f"{gcs_folder}/{file.relative_to(run)}", file.read_bytes())
    assert report.main([gcs_folder]) == EXIT_FINISHED
    words, images = parse(read_bytes(f"{gcs_folder}/report.html").decode())
    assert "finished: step 40 of 40" in words and "captions.png" in words and len(images) == 2
