"""A run's report: the text, and a self-contained page that escapes all untrusted input."""

from __future__ import annotations

import base64
import io
import json
import os
from html.parser import HTMLParser

import numpy as np
import pytest
from bucket import NAME, stand_in
from PIL import Image

from aimv2_jax.errors import EXIT_FINISHED, EXIT_USER
from aimv2_jax.monitoring import report, report_figures, report_page
from aimv2_jax.monitoring.events import KINDS, EventLog
from aimv2_jax.monitoring.report_facts import gather, is_notable
from aimv2_jax.monitoring.report_page import render_page
from aimv2_jax.monitoring.report_text import summary

HOSTILE = "<script>alert(1)</script>\"'&"
NOW_S = 5000.0
START = dict(processes=1, devices=8, device_kind="cpu", config="ab", steps=40, save_every=10, versions={})
VOID = ("meta", "img", "br", "hr", "link", "input")


class RecordedRun:
    """Records the events of starts whose steps take 2 s each."""

    def __init__(self, workdir):
        self.workdir, self.now_s = workdir, 1000.0

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
            line = {"step": step, "loss": loss, "loss_image": 0.5, "lr": 1e-3, "grad_norm": 1.0, "images_per_s": 100.0}
            line |= {"images/photos": 8} | ({"bad/photos/corrupt_record": 2} if step == 17 else {})
            file.write(json.dumps(line) + "\n")
            if step % 20 == 0:
                file.write(json.dumps({"step": step, "eval_loss": 0.1 * step, "eval_loss_image": 0.6}) + "\n")


@pytest.fixture(autouse=True)
def coarse(monkeypatch):
    """Figures of low resolution, which are faster to write."""
    monkeypatch.setattr(report_page, "_DOTS_PER_INCH", 40)


@pytest.fixture
def run(tmp_path):
    """A run killed at 17 and finished at 40, with all kinds of events, metrics and results."""
    workdir = tmp_path / "my run"
    workdir.mkdir()
    events = RecordedRun(workdir)
    events.start(0, 17, *[(kind, values) for kind, values in NOTABLE.items() if kind not in ("hang", "rewind")])
    events.start(10, 40, code=0)
    write_metrics(workdir)
    (workdir / "config.txt").write_text(f"train.steps = 40\ndata.sources.a = {HOSTILE!r}\n")
    fault = {"step": 17, "example": 9, "source": "photos", "record": 4, "key": HOSTILE, "reason": "corrupt_record"}
    (workdir / "bad_records.1.jsonl").write_text(json.dumps(fault) + "\n")
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


def decode(source):
    return Image.open(io.BytesIO(base64.b64decode(source.partition(",")[2])))


def test_every_kind_of_news_when_in_the_books_then_said_in_text_and_page(run):
    facts = gather(run, NOW_S)
    for text in (summary(facts), parse(render_page(facts))[0]):
        for part in (
            "checkpoint is damaged: state/d/0",
            "its update was skipped; input of a replay: nonfinite/17.npz",
            "batches 17 to 19 skipped: --skip_examples",
            "and all workers were restarted; it " + HOSTILE,
            "encoder/norm on cpu:1",
            "continued with changed data, as accepted: data source 'photo': 60 records before, 50 now",
            "bad records skipped: corrupt_record 2",
        ):
            assert part in text
    routine = {"start", "compiled", "restore", "save", "evaluation", "progress", "stop"}
    assert routine | set(NOTABLE) == set(KINDS)
    assert {event.kind for event in facts.events if is_notable(event)} == set(NOTABLE) - {"hang", "rewind"}


def test_text_when_the_run_was_killed_once_then_starts_time_and_goodput(run):
    text = " ".join(summary(gather(run, NOW_S)).split())
    assert "finished: step 40 of 40" in text
    assert "2 starts in 2 min 24 s" in text  # 20 + 34, 10 down, 20 + 60.
    assert "1 1970-01-01 00:16:40 0 to 17 7 54 s killed" in text
    assert "2 1970-01-01 00:17:44 10 s 10 to 40 0 1 min 20 s finished (0)" in text
    assert "productive 1 min 20 s 55.6 %" in text and "lost 14 s 9.7 %" in text and "down 10 s 6.9 %" in text
    # 40 of 47 steps are productive; with half of ten lost at the failure it would be 40 of 45.
    assert "goodput: 55.6 % of the time, and 85.1 % of the steps: of 47 steps done 7 were done again" in text
    assert "at each of 1 failure: 88.9 % of the steps" in text and "reached 95.7 % in steps, 97.2 % in time" in text
    assert "320 examples; 2 records could not be used: photos: corrupt_record 2" in text


def test_page_when_there_is_everything_then_whole_and_escaped(run):
    noise = np.random.default_rng(0).integers(0, 255, (900, 3000, 3), dtype=np.uint8)
    (run / "show").mkdir()
    Image.fromarray(noise).save(run / "show/predictions.png")
    (run / "show/broken.png").write_bytes(b"none")
    (run / "checkpoints").mkdir()
    (run / "checkpoints/not_this.png").write_bytes(b"none")
    (run / "heldout.json").write_text(json.dumps({"224": {"loss_image": 0.5, "loss_text": None, "examples": 11}}))
    probe = {"top1": 0.75, "ci95": [0.7, 0.8], "kind": "linear", "label": HOSTILE, "floor": {"top1": 0.25}}
    (run / "probe.json").write_text(json.dumps(probe))
    (run / "retrieval.json").write_text(json.dumps({"text_to_image": {"r1": 0.5}, "image_to_text": {"r1": 0.25}}))
    (run / "other.json").write_text("[1, 2]")
    (run / "half.json").write_text("{")
    text = render_page(gather(run, NOW_S))
    words, images = parse(text)
    assert text.count(HOSTILE) == 0 and "&lt;script&gt;alert(1)" in text
    assert f"data.sources.a = {HOSTILE!r}" in words and HOSTILE in words
    for part in ("my run", "Finished: step 40 of 40", "55.6 %", "show/predictions.png", "0.7500", "0.7000 to 0.8000"):
        assert part in words
    assert "Held-out figures at 224" in words and "text to image r1" in words and "Linear probe of " in words
    assert words.count("The image cannot be read.") == 1 and "not_this" not in words
    *figures, image = images
    assert [decode(source).format for source in figures] == ["PNG"] * 3  # Timeline, goodput, curves.
    assert decode(image).size == (1400, 420) and len(text) < 4e6


def test_page_when_the_run_has_no_books_then_says_so_and_shows_the_curves(run):
    (run / "events.jsonl").unlink()
    facts = gather(run, NOW_S)
    words, images = parse(render_page(facts))
    assert "no events.jsonl" in words and "no events.jsonl" in summary(facts) and len(images) == 1
    assert facts.state() == "finished: step 40 of 40"


def test_page_when_there_are_only_books_then_without_curves(tmp_path):
    RecordedRun(tmp_path).start(0, 5)
    words, images = parse(render_page(gather(tmp_path, NOW_S)))
    assert "There are no metrics yet." in words and len(images) == 2


def test_page_when_a_start_was_just_written_then_whole(tmp_path):
    with EventLog(tmp_path, clock=lambda: 0.0) as events:
        events.write("start", 0, **START)
    facts = gather(tmp_path)
    assert "The run has just started." in parse(render_page(facts))[0]
    assert "running: step 0 of 40" in summary(facts)


@pytest.mark.parametrize(
    "code, later_s, state",
    [
        (None, 60, "running: step 17 of 40, last event 1 min 00 s ago"),
        (
            None,
            86400,
            "no end was logged: killed, or it cannot reach its workdir: step 17 of 40, last event 1 d 00 h ago",
        ),
        (75, 60, f"stopped on request: step 17 of 40 ({HOSTILE})"),
        (3, 60, f"stopped by a guard: step 17 of 40 ({HOSTILE})"),
    ],
)
def test_state_when_the_last_start_ended_so_then_said(tmp_path, code, later_s, state):
    events = RecordedRun(tmp_path)
    events.start(0, 17, code=code)
    assert gather(tmp_path, events.now_s - 10 + later_s).state() == state


def test_state_when_it_hung_then_said(tmp_path):
    RecordedRun(tmp_path).start(0, 17, ("hang", NOTABLE["hang"]))
    assert gather(tmp_path).state() == "ended after a hang: step 17 of 40 (waiting for data)"


def test_marks_when_starts_and_rewinds_are_there_then_only_restarts_and_what_went_wrong(tmp_path):
    events = RecordedRun(tmp_path)
    events.start(0, 17, ("rewind", NOTABLE["rewind"]))
    events.start(10, 20, code=0)
    marks = report_figures.marked_events(gather(tmp_path).events)
    assert {kind: [event.step for event in events] for kind, events in marks.items()} == {"start": [10], "rewind": [17]}


def test_timeline_when_drawn_then_every_stretch_is_full(run):
    goodput_report = gather(run).report
    _, shares = report_figures._shares(goodput_report.spans, goodput_report.total_s)
    np.testing.assert_allclose(sum(shares.values()), 1.0, atol=1e-9)
    # Half a bin may be of another class: 20 s of start-up at the beginning, 10 s of down after 54 s.
    bin_s = goodput_report.total_s / len(shares["down"])
    assert shares["start-up"][: int(20 / bin_s)] == pytest.approx(1)
    assert shares["down"].sum() * bin_s == pytest.approx(10)
    assert shares["down"][int(59 / bin_s)] == pytest.approx(1)


def test_starts_when_there_are_very_many_then_the_page_stays_small(tmp_path):
    events = RecordedRun(tmp_path)
    for _ in range(300):
        events.start(0, 2)
    write_metrics(tmp_path)
    text = render_page(gather(tmp_path))
    words, _ = parse(text)
    assert "275 older rows" in words and len(text) < 2e6


def test_command_when_given_a_run_then_prints_and_writes_one_file(run, capsys):
    before = {path: path.read_bytes() for path in run.iterdir()}
    assert report.main([str(run)]) == EXIT_FINISHED
    printed = capsys.readouterr().out
    assert "goodput: 55.6 %" in printed and printed.endswith(f"{run / 'report.html'}\n")
    assert {path: path.read_bytes() for path in run.iterdir() if path.name != "report.html"} == before
    parse((run / "report.html").read_text(encoding="utf-8"))
    assert report.main([str(run), "--output", str(run / "other.html")]) == EXIT_FINISHED
    assert (run / "other.html").exists()


def test_page_takes_pngs_only_whatever_a_name_says(tmp_path, monkeypatch):
    """Pillow would pass PostScript to Ghostscript, which executes it."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/gs").write_text(f"#!/bin/sh\necho called >> {tmp_path}/gs_called\n")
    (tmp_path / "bin/gs").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}/bin:{os.environ['PATH']}")
    run = tmp_path / "run"
    run.mkdir()
    write_metrics(run)
    Image.new("RGB", (100, 100)).save(run / "pretty.eps")
    (run / "pretty.eps").rename(run / "pretty.png")
    words, _ = parse(render_page(gather(run)))
    assert "pretty.png" in words and "The image cannot be read." in words
    assert not (tmp_path / "gs_called").exists()


def test_page_skips_pipes_links_and_large_images(tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    write_metrics(run)
    os.mkfifo(run / "pipe.png")
    os.mkfifo(run / "pipe.json")
    Image.new("RGB", (8, 8)).save(tmp_path / "secret.png")
    (run / "link.png").symlink_to("../secret.png")
    Image.new("1", (6000, 6000)).save(run / "bomb.png")
    words, images = parse(render_page(gather(run)))
    assert "link.png" not in words and words.count("The image cannot be read.") == 2  # The pipe and the bomb.
    assert len(images) == 1  # The curves.


@pytest.mark.parametrize(
    "content",
    [
        {"top1": "much", "label": ["x"], "ci95": [1], "floor": {"top1": {}}},
        {"top1": 10**400, "label": 1, "ci95": 3},
        {"text_to_image": 3, "image_to_text": [1]},
        {"loss_image": [[1]], "loss_text": "\x1b[31m"},
        "[" * 100_000,
        '{"a": ' * 100_000,
    ],
)
def test_report_of_results_of_odd_types_is_whole(tmp_path, content):
    write_metrics(tmp_path)
    (tmp_path / "x.json").write_text(content if isinstance(content, str) else json.dumps(content))
    facts = gather(tmp_path)
    parse(render_page(facts))
    assert "\x1b" not in summary(facts)


_HEAD = {"kind": "start", "step": 0, "time": 1.0, "clock": 1.0, "run": "a"}


@pytest.mark.parametrize(
    "file, line",
    [
        ("metrics.jsonl", {"step": 10**22, "loss": 1.0}),
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
def test_command_when_it_cannot_work_then_one_sentence(tmp_path, capsys, make, flags, message):
    folder = tmp_path / "run"
    folder.mkdir()
    make(folder)
    assert report.main([str(folder), *flags]) == EXIT_USER
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_command_when_the_run_is_in_a_bucket_then_reads_and_writes_there(run, tmp_path, monkeypatch):
    bucket = stand_in(tmp_path / "bucket", monkeypatch)
    Image.new("RGB", (8, 8)).save(run / "captions.png")
    os.rename(run, bucket / "run")
    assert report.main([f"{NAME}/run"]) == EXIT_FINISHED
    words, images = parse((bucket / "run/report.html").read_text(encoding="utf-8"))
    assert "Finished: step 40 of 40" in words and "captions.png" in words and len(images) == 4
