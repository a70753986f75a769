"""The metrics file, its cut after a restore, the progress line and the stopwatch."""

import json
import os
import re
import struct
import sys
import types

import jax.numpy as jnp
import numpy as np
import pytest

from aimv2_jax.config.load import build_config
from aimv2_jax.errors import UserError
from aimv2_jax.monitoring.metrics import MetricsWriter, ProgressLine, Stopwatch, read_metrics
from experiments import base


@pytest.fixture(scope="module")
def config():
    tree = base.get_config().to_dict()
    tree["data"]["sources"] = {"photos": "/a/photos"}
    tree["data"]["mixture"] = {"photos": {"alt": 1.0}}
    return build_config(tree)


@pytest.fixture
def open_writer(tmp_path, config):
    def make(tensorboard=False, wandb_project=None):
        return MetricsWriter(tmp_path, tensorboard=tensorboard, wandb_project=wandb_project, config=config)

    return make


def _lines(tmp_path):
    def no_constants(name):
        raise AssertionError(f"{name} is not JSON")

    text = (tmp_path / "metrics.jsonl").read_text()
    assert text.endswith("\n") or not text
    return [json.loads(line, parse_constant=no_constants) for line in text.splitlines()]


def test_line_is_json_with_the_step_first(tmp_path, open_writer):
    """Values of any type give a line of valid JSON that begins with the step."""
    with open_writer() as writer:
        values = {
            "loss": jnp.float32(0.5),
            "grad_norm": np.float32("inf"),
            "param_norm": float("nan"),
            "bad": np.int64(3),
            "mfu": None,
            "device": "cpu",
        }
        writer.write(np.int64(2), values)
    (line,) = _lines(tmp_path)
    assert list(line) == ["step", *values]
    assert line == {
        "step": 2,
        "loss": 0.5,
        "grad_norm": None,
        "param_norm": None,
        "bad": 3,
        "mfu": None,
        "device": "cpu",
    }


def test_line_when_written_then_it_is_on_disk_at_once(tmp_path, open_writer):
    with open_writer() as writer:
        writer.write(1, {"loss": 1.0})
        assert _lines(tmp_path) == [{"step": 1, "loss": 1.0}]


def test_cut_after_a_restore_leaves_no_step_twice(tmp_path, open_writer):
    """After a restore later lines are cut, so that no step occurs twice."""
    with open_writer() as writer:
        for step in range(1, 6):
            writer.write(step, {"loss": float(step)})
        writer.write(5, {"eval_loss": 9.0})
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 3, "lo')  # A partial line, as after a kill.
    with open_writer() as writer:
        writer.cut_after(3)
        assert [line["step"] for line in _lines(tmp_path)] == [1, 2, 3]
        writer.write(4, {"loss": 40.0})
        writer.cut_after(4)
        writer.write(5, {"loss": 50.0})
    assert [(line["step"], line["loss"]) for line in _lines(tmp_path)] == [(1, 1), (2, 2), (3, 3), (4, 40), (5, 50)]
    assert not list(tmp_path.glob("*.part"))


def test_cut_without_a_file(tmp_path, open_writer):
    """Cutting creates no file."""
    with open_writer() as writer:
        writer.cut_after(10)
    assert not (tmp_path / "metrics.jsonl").exists()


def test_reading_splits_training_and_evaluation(tmp_path, open_writer):
    """Training and evaluation lines are returned separately, without an unfinished last line."""
    with open_writer() as writer:
        writer.write(1, {"loss": 2.0})
        writer.write(2, {"loss": float("nan")})
        writer.write(2, {"eval_loss": 1.5, "eval_loss_text": 1.0})
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 3')  # The partial line of a running trainer.
    train, evaluation = read_metrics(tmp_path)
    assert train == [{"step": 1, "loss": 2.0}, {"step": 2, "loss": None}]
    assert evaluation == [{"step": 2, "eval_loss": 1.5, "eval_loss_text": 1.0}]


def test_reading_when_a_line_in_the_middle_is_damaged(tmp_path, capsys):
    """It is skipped and logged without control characters; a reader changes nothing."""
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1}\n{"st\x1b[2J\n{"step": 3}\n')
    before = path.read_bytes()
    assert read_metrics(tmp_path) == ([{"step": 1}, {"step": 3}], [])
    stderr = capsys.readouterr().err
    assert re.search(r"metrics\.jsonl:2 is skipped: .*\(\{\"st\\x1b\[2J\)\n$", stderr) and stderr.count("\n") == 1
    assert path.read_bytes() == before and len(list(tmp_path.iterdir())) == 1


def test_reading_a_damaged_line_when_stderr_is_gone(tmp_path, monkeypatch):
    reading, writing = os.pipe()
    os.close(reading)
    (tmp_path / "metrics.jsonl").write_bytes(b'{"step": 1}\nno line\n')
    with open(writing, "w") as gone:
        monkeypatch.setattr(sys, "stderr", gone)
        assert read_metrics(tmp_path) == ([{"step": 1}], [])


DAMAGED = [b"\xff\xfe\x00", b"\0" * 4096 + b'{"step": 2}', b"[1, 2]", b'{"loss": 1.0}', b'{"step": "x"}', b"[" * 10**5]


@pytest.mark.parametrize("line", DAMAGED, ids=range(len(DAMAGED)))
def test_cut_when_a_line_is_damaged_then_set_aside(tmp_path, open_writer, capsys, line):
    """The run continues, and every such line is kept unchanged in a second file."""
    path = tmp_path / "metrics.jsonl"
    for _ in range(2):
        path.write_bytes(b'{"step": 1}\n' + line + b'\n{"step": 2}\n{"step": 3}\n')
        open_writer().cut_after(2)
        assert path.read_bytes() == b'{"step": 1}\n{"step": 2}\n'
        assert "metrics.jsonl:2 is not JSON with a step" in capsys.readouterr().err
    assert (tmp_path / "metrics.jsonl.damaged").read_bytes() == 2 * (line + b"\n")


def test_reading_an_empty_file_is_a_user_error(tmp_path):
    """An empty file raises UserError."""
    (tmp_path / "metrics.jsonl").write_text("")
    with pytest.raises(UserError, match="no metrics"):
        read_metrics(tmp_path)


def test_reading_when_there_is_no_file_then_user_error(tmp_path):
    with pytest.raises(UserError, match="no metrics"):
        read_metrics(tmp_path)


def test_writing_below_a_file_is_a_user_error(tmp_path, config):
    """A workdir that cannot be created raises UserError."""
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written"):
        MetricsWriter(tmp_path / "file" / "run", tensorboard=False, wandb_project=None, config=config)


def _events(tmp_path):
    """`(step, tag or kind)` of all TensorBoard events, file after file as TensorBoard reads them."""
    from tensorboardX.proto import event_pb2

    events = []
    for path in sorted((tmp_path / "tensorboard").iterdir()):
        data = path.read_bytes()
        while data:
            (length,) = struct.unpack("<Q", data[:8])  # Record: length, its checksum, the event, its checksum.
            event = event_pb2.Event.FromString(data[12 : 12 + length])
            data = data[16 + length :]
            if event.WhichOneof("what") == "session_log":
                assert event.session_log.status == event_pb2.SessionLog.START
                events.append((event.step, "session start"))
            events += [(event.step, value.tag) for value in event.summary.value]
    return events


def test_tensorboard_resume_purges_lost_steps(tmp_path, open_writer):
    """A resume purges lost steps from TensorBoard and keeps earlier ones."""
    with open_writer(tensorboard=True) as writer:
        for step in (1, 2, 3):
            writer.write(step, {"loss": 1.0, "mfu": None})
    with open_writer(tensorboard=True) as writer:  # In the same second: the files must not overwrite each other.
        writer.cut_after(2)
        writer.write(3, {"loss": 2.0})
    config = "config/text_summary"
    first = [(1, config), (1, "loss"), (2, "loss"), (3, "loss")]
    assert _events(tmp_path) == [*first, (3, "session start"), (3, config), (3, "loss")]


def test_wandb_not_installed_is_a_user_error(monkeypatch, open_writer):
    """The error names the extra to install."""
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UserError, match=r"aimv2_jax\[wandb\]"):
        open_writer(wandb_project="project")


def test_wandb_restart_continues_the_same_run(monkeypatch, tmp_path, open_writer):
    """A restart continues the same run of Weights & Biases."""
    starts, logged = [], []

    class WandbRun:
        def log(self, values, step):
            logged.append((step, values))

        def finish(self):
            logged.append("finished")

    def init(**settings):
        starts.append(settings)
        return WandbRun()

    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=init))
    for step in (1, 2):
        with open_writer(wandb_project="project") as writer:
            writer.write(step, {"loss": 1.0, "mfu": None})
    assert starts[0]["id"] == starts[1]["id"] == (tmp_path / "wandb_id").read_text()
    assert starts[0]["project"] == "project" and starts[0]["resume"] == "allow"
    assert logged == [(1, {"loss": 1.0}), "finished", (2, {"loss": 1.0}), "finished"]


class _Clock:
    def __init__(self):
        self.now_s = 1000.0

    def __call__(self):
        return self.now_s

    def sleep(self, seconds):
        self.now_s += seconds


def test_stopwatch_when_paused_then_only_steps_count():
    clock = _Clock()
    watch = Stopwatch(clock)
    with watch.pause():
        clock.sleep(60)  # The first step compiles.
    for _ in range(4):
        with watch.waiting():
            clock.sleep(0.5)
        clock.sleep(1.5)
        watch.count(32, 8e12)
    with watch.pause():
        clock.sleep(100)  # An evaluation.
    expected = {"images_per_s": 16.0, "model_tflops_per_s": 4.0, "step_time_s": 2.0, "data_wait_fraction": 0.25}
    assert watch.lap() == expected


def test_stopwatch_lap_starts_the_next_at_zero():
    """Steps and waiting of one lap do not count in the next."""
    clock = _Clock()
    watch = Stopwatch(clock)
    with watch.waiting():
        clock.sleep(5)
    watch.count(1, 1e12)
    watch.lap()
    clock.sleep(2)
    watch.count(10, 6e12)
    expected = {"images_per_s": 5.0, "model_tflops_per_s": 3.0, "step_time_s": 2.0, "data_wait_fraction": 0.0}
    assert watch.lap() == expected


def test_stopwatch_without_steps_has_no_rates():
    """Without a step all rates are None."""
    clock = _Clock()
    watch = Stopwatch(clock)
    with watch.pause():
        clock.sleep(5)
    assert set(watch.lap().values()) == {None}


def test_stopwatch_leaves_out_a_pause_that_raises():
    """A pause that ends in an error does not count."""
    clock = _Clock()
    watch = Stopwatch(clock)
    with pytest.raises(ZeroDivisionError), watch.pause():
        clock.sleep(7)
        raise ZeroDivisionError
    clock.sleep(1)
    watch.count(3, 0.0)
    assert watch.lap()["images_per_s"] == 3.0


VALUES = {
    "loss": 3.14159,
    "loss_image": 0.75,
    "loss_text": 2.5,
    "lr": 1e-3,
    "grad_norm": 0.7123,
    "images_per_s": 14.53,
    "data_wait_fraction": 0.031,
    "step_time_s": 2.0,
}


def test_progress_when_written_then_all_is_on_one_line():
    text = ProgressLine(50_000, clock=_Clock()).text(100, VALUES)
    assert text == (
        "step    100/50,000  loss 3.1416  image 0.7500  text 2.5000  lr 1.00e-03  grad 0.712  images/s   14.5  wait  3%"
        "  1 d 03 h left"
    )


def test_progress_time_left_includes_evaluations():
    """The time left is that of the last steps' rate, evaluations included."""
    clock = _Clock()
    line = ProgressLine(1000, clock=clock)
    assert line.text(100, VALUES).endswith("  30 min 00 s left")  # 900 steps of step_time_s.
    clock.sleep(100 * 4.0)
    assert line.text(200, VALUES).endswith("  53 min 20 s left")  # 800 steps at the rate of the last 100.
    clock.sleep(100 * 4.0)
    assert line.text(1000, VALUES).endswith("  done")


def test_progress_of_missing_values():
    """Missing or null values are dashes in the progress line."""
    line = ProgressLine(10, clock=_Clock())
    assert line.text(1, {"loss": 1.0, "images_per_s": None}) == "step  1/10  loss 1.0000  images/s      -"
    assert line.text(1, {"loss": float("nan"), "step_time_s": 9.0}) == "step  1/10  loss      -  1 min 21 s left"
