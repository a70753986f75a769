"""Goodput of synthetic event logs: productive steps, lost steps, and the class of every second."""

from __future__ import annotations

import importlib.util
import random
import sys
from pathlib import Path

import pytest

from aimv2_jax.monitoring.events import Event, read_events
from aimv2_jax.monitoring.goodput import CLASSES, DOWN, LOST, OTHER, PRODUCTIVE, compute_goodput

DRILL = Path(__file__).resolve().parents[2] / "tests/stress/goodput.py"


class RecordedRun:
    """Records the events of a run: each step takes 2 s, waits 1 s for data, and is logged at once."""

    def __init__(self, began_s=1000.0):
        self.events, self.wall_s = [], began_s
        self.runs = self.step = 0

    def start(self, step, save_every=10, start_up_s=30.0):
        self.runs += 1
        self.step, self.clock_s, self.sums = step, 0.0, dict(step_s=0.0, data_s=0.0, evaluation_s=0.0, saving_s=0.0)
        self.add("start", save_every=save_every)
        self.spend(start_up_s)
        self.add("compiled", seconds=start_up_s)
        return self

    def spend(self, seconds, what=None):
        self.clock_s += seconds
        self.wall_s += seconds
        if what:
            self.sums[what] += seconds

    def add(self, kind, step=None, **values):
        step = self.step if step is None else step
        self.events.append(Event(kind, step, self.wall_s, self.clock_s, f"run{self.runs}", values))

    def steps(self, count, log=True):
        for _ in range(count):
            self.spend(1.0, "data_s")
            self.spend(2.0, "step_s")
            self.step += 1
            if log:
                self.add("progress", **self.sums)
        return self

    def stop(self, code=0):
        self.add("stop", code=code, why="")
        return self

    def down(self, seconds):
        self.wall_s += seconds
        return self

    def compute_goodput(self):
        report = compute_goodput(self.events)
        assert list(report.seconds) == list(CLASSES) and min(report.seconds.values()) >= 0
        if report.starts:
            assert report.total_s == pytest.approx(report.starts[-1].end_s)
        ends = [0.0, *(span.end_s for span in report.spans)]
        for span, end_s in zip(report.spans, ends):  # Spans have no gaps, and each second has a class.
            assert span.begin_s == pytest.approx(end_s)
            assert sum(span.seconds.values()) == pytest.approx(span.end_s - span.begin_s)
        return report


def _seconds(report):
    return {kind: round(value, 6) for kind, value in report.seconds.items() if round(value, 6)}


def test_goodput_without_events():
    """The report of a run without events is empty."""
    report = RecordedRun().compute_goodput()
    assert (report.starts, report.total_s, report.goodput, report.steps_goodput, report.expected) == (
        [],
        0,
        None,
        None,
        None,
    )


def test_goodput_of_uninterrupted_run():
    """Every step of an uninterrupted run counts."""
    events = RecordedRun().start(0).steps(20)
    events.spend(40, "evaluation_s")
    events.add("evaluation", seconds=40.0, eval_loss=1.0)
    events.spend(4, "saving_s")
    events.add("save", seconds=4.0)
    report = events.stop().compute_goodput()
    assert _seconds(report) == {"productive": 40, "start-up": 30, "data": 20, "evaluation": 40, "saving": 4}
    [start] = report.starts
    assert (start.ended, start.code, start.steps, start.lost, start.failed) == ("finished", 0, 20, 0, False)
    assert (report.kept_steps, report.steps_goodput, report.failures, report.expected) == (20, 1.0, 0, None)
    assert report.goodput == pytest.approx(40 / 134)


def test_goodput_of_run_killed_twice():
    """A run that was killed twice has lost steps and down time."""
    events = RecordedRun().start(0).steps(17).down(50)
    events.start(10).steps(28).down(20)
    report = events.start(30).steps(10).stop().compute_goodput()
    assert [start.ended for start in report.starts] == ["killed", "killed", "finished"]
    assert [(start.from_step, start.to_step, start.lost) for start in report.starts] == [
        (0, 17, 7),
        (10, 38, 8),
        (30, 40, 0),
    ]
    assert _seconds(report) == {"productive": 80, "lost": 30, "start-up": 90, "data": 55, "down": 70}
    assert (report.kept_steps, report.lost_by_restarts, report.lost_by_rewinds) == (40, 15, 0)
    assert report.steps_goodput == pytest.approx(40 / 55)
    # Two failures at 10 / 2 steps each: 40 of 50. In time: 10 steps of 2 s instead of the 15 lost ones.
    assert report.failures == 2 and report.max_unseen_steps == 0
    assert report.expected.steps == pytest.approx(40 / 50)
    assert report.expected.reached_steps == pytest.approx((40 / 55) / (40 / 50))
    assert report.expected.time == pytest.approx(80 / (report.total_s - 30 + 20))
    assert report.expected.reached_time == pytest.approx((report.total_s - 30 + 20) / report.total_s)


def test_unsaved_steps_of_a_killed_run_count():
    """Steps of a killed run count as productive until a later start does them again."""
    report = RecordedRun().start(0).steps(17).compute_goodput()
    [start] = report.starts
    assert (start.ended, start.lost, report.kept_steps, report.expected) == ("", 0, 17, None)


def test_run_when_stopped_on_request_then_no_failure():
    events = RecordedRun().start(0).steps(17)
    events.add("preemption")
    report = events.stop(75).down(10).start(17).steps(3).stop().compute_goodput()
    assert [start.ended for start in report.starts] == ["stopped", "finished"]
    assert (report.failures, report.lost_by_restarts, report.kept_steps, report.expected) == (0, 0, 20, None)


def test_goodput_of_start_killed_before_first_step():
    """A start that is killed before its first step is all start-up time and loses no step."""
    events = RecordedRun().start(0)
    report = events.down(5).start(0).steps(2).stop().compute_goodput()
    assert _seconds(report) == {"productive": 4, "start-up": 60, "data": 2, "down": 5}
    assert report.failures == 0


def test_wall_clock_set_back():
    """No class of time is negative, and the classes add up to the total."""
    events = RecordedRun().start(0).steps(10)
    events.wall_s -= 3600  # While the run is down ...
    events.start(10).steps(5)
    events.wall_s -= 3600  # ... and while it is running.
    events.steps(5).down(8)
    report = events.start(20).steps(5).stop().compute_goodput()
    assert report.seconds[DOWN] == pytest.approx(8) and report.seconds[OTHER] == 0
    assert report.total_s == pytest.approx(3 * 30 + 25 * 3 + 8)
    assert [start.down_s for start in report.starts] == [0, 0, pytest.approx(8)]


def test_goodput_of_rewind():
    """The steps that are done again after a rewind are lost by it."""
    events = RecordedRun().start(0).steps(18)
    events.add("rewind", from_step=18, to_step=10, a=12, b=18)
    events.step = 10
    report = events.steps(20).stop().compute_goodput()
    assert (report.kept_steps, report.lost_by_rewinds, report.lost_by_restarts) == (30, 8, 0)
    assert _seconds(report) == {"productive": 60, "lost": 16, "start-up": 30, "data": 38}
    [start] = report.starts
    assert (start.steps, start.lost, start.from_step, start.to_step) == (38, 8, 0, 30)
    assert report.expected is None


def test_goodput_of_rewind_between_log_events():
    """The time between two log events around a rewind is shared out by steps."""
    events = RecordedRun().start(0).steps(10).steps(4, log=False)
    events.add("rewind", from_step=14, to_step=10, a=12, b=14)
    events.step = 10
    events.steps(5, log=False).steps(1)
    report = events.stop().compute_goodput()
    assert (report.kept_steps, report.lost_by_rewinds) == (16, 4)
    assert report.seconds[LOST] == pytest.approx(8) and report.seconds[PRODUCTIVE] == pytest.approx(32)


def test_restart_before_a_rewind_loses_steps_once():
    """A step that both a rewind and a later start did again is lost once."""
    events = RecordedRun().start(0).steps(18)
    events.add("rewind", from_step=18, to_step=10, a=12, b=18)
    events.step = 10
    events.steps(5).down(1)
    report = events.start(5).steps(15).stop().compute_goodput()
    assert (report.kept_steps, report.lost_by_rewinds, report.lost_by_restarts) == (20, 8, 10)
    assert [start.lost for start in report.starts] == [18, 0]


def test_goodput_of_two_restarts_at_same_step():
    """The lost steps of two restarts before the same step add up."""
    events = RecordedRun().start(0).steps(15).down(1).start(10).steps(5).down(1)
    report = events.start(10).steps(10).stop().compute_goodput()
    assert (report.kept_steps, report.lost_by_restarts) == (20, 10)
    assert sum(start.lost for start in report.starts) == 10


def test_goodput_of_restart_from_earlier_checkpoint():
    """Two starts both lose steps if the next one begins at a step before both."""
    events = RecordedRun().start(0).steps(17).stop(75)
    events.start(17).steps(3).down(1)  # Loses nothing; then all later checkpoints are found damaged.
    report = events.start(5).steps(15).stop().compute_goodput()
    assert [start.lost for start in report.starts] == [12, 3, 0]
    assert (report.kept_steps, report.lost_by_restarts) == (20, 15)


@pytest.mark.parametrize("seed", range(30))
def test_goodput_of_random_runs(seed):
    """The steps that count are those from the first to the last, whatever happens in the run."""
    rng = random.Random(seed)
    events, done = RecordedRun(), 0
    for _ in range(rng.randint(1, 8)):
        events.start(rng.randint(0, events.step) if events.events else 0)
        for _ in range(rng.randint(0, 6)):
            count = rng.randint(0, 9)
            events.steps(count, log=rng.random() < 0.5)
            done += count
            if rng.random() < 0.3:
                to_step = rng.randint(0, events.step)
                events.add("rewind", from_step=events.step, to_step=to_step, a=0, b=1)
                events.step = to_step
            if rng.random() < 0.2:
                events.wall_s += rng.uniform(-100, 100)
        events.spend(rng.uniform(0, 5))
        events.add("evaluation", seconds=1.0, eval_loss=1.0)  # Makes all steps known.
    report = events.compute_goodput()
    assert report.kept_steps == events.step
    assert report.kept_steps + report.lost_by_restarts + report.lost_by_rewinds == done
    assert sum(start.lost for start in report.starts) == report.lost_by_restarts + report.lost_by_rewinds


def test_goodput_after_last_sums_of_start():
    """The end of a start, after its last sums, is computed from single events."""
    events = RecordedRun().start(0).steps(10)
    events.steps(2, log=False)
    events.spend(7)
    events.add("evaluation", seconds=7.0, eval_loss=1.0)
    report = events.stop(3).compute_goodput()
    assert report.starts[0].ended == "guard" and report.kept_steps == 12
    assert _seconds(report) == {"productive": 24, "start-up": 30, "data": 10, "evaluation": 7, "other": 2}


def test_goodput_of_hang():
    """The time of a hang is no step time, and the start counts as failed."""
    events = RecordedRun().start(0).steps(10)
    events.spend(600)
    events.add("hang", step=11, what="data", file="hang.txt")
    report = events.down(10).start(10).steps(10).stop().compute_goodput()
    assert report.starts[0].ended == "hung" and report.starts[0].why == "waiting for data"
    assert report.seconds[OTHER] == pytest.approx(600)
    assert (report.kept_steps, report.lost_by_restarts, report.failures) == (20, 0, 1)


def test_start_when_a_device_failed():
    """The exit code is that of a requested stop, but the start counts as a failure."""
    events = RecordedRun().start(0).steps(10)
    events.add("device_failure", status="INTERNAL: Core halted", file="hangs/11.txt")
    report = events.stop(75).down(10).start(10).steps(10).stop().compute_goodput()
    assert (report.starts[0].ended, report.starts[0].code, report.failures) == ("device failure", 75, 1)


def test_goodput_with_rare_log_events():
    """Steps that may be unseen because log events are rare are reported and counted as lost."""
    events = RecordedRun().start(0)
    for _ in range(4):
        events.steps(4, log=False).steps(1)
    report = events.down(15).start(20).steps(20).stop().compute_goodput()
    assert (report.lost_by_restarts, report.max_unseen_steps) == (0, 4)
    assert report.expected.reached_steps == pytest.approx((40 / 44) / (40 / 45))


def test_goodput_of_two_starts_interleaved():
    """Two starts whose lines are interleaved are reported separately."""
    first = RecordedRun().start(0).steps(5)
    second = RecordedRun(1100.0)
    second.runs = 1
    second.start(5).steps(5).stop()
    tangled = [*first.events[:-1], second.events[0], first.events[-1], *second.events[1:]]
    report = compute_goodput(tangled)
    assert [start.steps for start in report.starts] == [5, 5]
    assert sum(report.seconds.values()) == pytest.approx(report.starts[-1].end_s)


@pytest.fixture(scope="module")
def drill():
    spec = importlib.util.spec_from_file_location("goodput_drill", DRILL)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("log_every", [1, 5])
def test_drill_with_failure_every_100_steps(tmp_path, drill, log_every):
    """A drill with a failure every 100 steps reaches more than 95 percent of what saving allows."""
    run = drill.SimulatedRun(steps=3000, log_every=log_every)
    truth = drill.simulate(run, tmp_path, seed=1)
    result = drill.figures(compute_goodput(read_events(tmp_path)), truth)
    assert drill.find_failures(result, log_every) == []
    assert 20 < truth.failures < 45 and result["steps_that_count"] == 3000
    assert 0.95 < result["steps_reached"] < 1.05 and 0.95 < result["goodput_reached"] < 1.05


def test_drill_fails_if_saves_complete_too_late(tmp_path, drill):
    """The drill fails if a save takes a full interval to complete."""
    run = drill.SimulatedRun(steps=3000, commit_s=9.0)  # A full interval, so that twice the mean is lost.
    truth = drill.simulate(run, tmp_path, seed=1)
    result = drill.figures(compute_goodput(read_events(tmp_path)), truth)
    assert any("steps_reached" in failure for failure in drill.find_failures(result, run.log_every))
