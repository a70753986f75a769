"""The story that invented books tell: steps that count, steps that were lost, and where every second went."""

from __future__ import annotations

import importlib.util
import random
import sys
from pathlib import Path

import pytest

from aimv2_jax.train.events import Event, read_events
from aimv2_jax.train.goodput import CLASSES, DOWN, LOST, OTHER, PRODUCTIVE, tell

DRILL = Path(__file__).resolve().parents[2] / "experiments/drills/goodput.py"


class Books:
    """Writes down a run: each step takes 2 s, waits 1 s for data, and is told at once."""

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

    def steps(self, count, told=True):
        for _ in range(count):
            self.spend(1.0, "data_s")
            self.spend(2.0, "step_s")
            self.step += 1
            if told:
                self.add("progress", **self.sums)
        return self

    def stop(self, code=0):
        self.add("stop", code=code, why="")
        return self

    def down(self, seconds):
        self.wall_s += seconds
        return self

    def tell(self):
        story = tell(self.events)
        assert list(story.seconds) == list(CLASSES) and min(story.seconds.values()) >= 0
        if story.starts:
            assert story.total_s == pytest.approx(story.starts[-1].end_s)
        ends = [0.0, *(span.end_s for span in story.spans)]
        for span, end_s in zip(story.spans, ends):  # Without gaps, and each second in a class.
            assert span.begin_s == pytest.approx(end_s)
            assert sum(span.seconds.values()) == pytest.approx(span.end_s - span.begin_s)
        return story


def _seconds(story):
    return {kind: round(value, 6) for kind, value in story.seconds.items() if round(value, 6)}


def test_story_when_there_are_no_books_then_empty():
    story = Books().tell()
    assert (story.starts, story.total_s, story.goodput, story.steps_goodput, story.allowed) == ([], 0, None, None, None)


def test_plain_run_when_told_then_every_step_counts():
    books = Books().start(0).steps(20)
    books.spend(40, "evaluation_s")
    books.add("evaluation", seconds=40.0, eval_loss=1.0)
    books.spend(4, "saving_s")
    books.add("save", seconds=4.0)
    story = books.stop().tell()
    assert _seconds(story) == {"productive": 40, "start-up": 30, "data": 20, "evaluation": 40, "saving": 4}
    [start] = story.starts
    assert (start.ended, start.code, start.steps, start.lost, start.failed) == ("finished", 0, 20, 0, False)
    assert (story.kept_steps, story.steps_goodput, story.failures, story.allowed) == (20, 1.0, 0, None)
    assert story.goodput == pytest.approx(40 / 134)


def test_run_killed_twice_when_told_then_lost_steps_and_down_time():
    books = Books().start(0).steps(17).down(50)
    books.start(10).steps(28).down(20)
    story = books.start(30).steps(10).stop().tell()
    assert [start.ended for start in story.starts] == ["killed", "killed", "finished"]
    assert [(start.from_step, start.to_step, start.lost) for start in story.starts] == [
        (0, 17, 7),
        (10, 38, 8),
        (30, 40, 0),
    ]
    assert _seconds(story) == {"productive": 80, "lost": 30, "start-up": 90, "data": 55, "down": 70}
    assert (story.kept_steps, story.lost_by_restarts, story.lost_by_rewinds) == (40, 15, 0)
    assert story.steps_goodput == pytest.approx(40 / 55)
    # Two failures at 10 / 2 steps each: 40 of 50; in time 2 s each instead of the 15 that were lost.
    assert story.failures == 2 and story.unseen_most == 0
    assert story.allowed.steps == pytest.approx(40 / 50)
    assert story.allowed.reached_steps == pytest.approx((40 / 55) / (40 / 50))
    assert story.allowed.time == pytest.approx(80 / (story.total_s - 30 + 20))
    assert story.allowed.reached_time == pytest.approx((story.total_s - 30 + 20) / story.total_s)


def test_run_when_killed_at_work_then_its_unsaved_steps_count_until_done_again():
    story = Books().start(0).steps(17).tell()
    [start] = story.starts
    assert (start.ended, start.lost, story.kept_steps, story.allowed) == ("", 0, 17, None)


def test_run_when_stopped_on_request_then_no_failure():
    books = Books().start(0).steps(17)
    books.add("preemption")
    story = books.stop(75).down(10).start(17).steps(3).stop().tell()
    assert [start.ended for start in story.starts] == ["stopped", "finished"]
    assert (story.failures, story.lost_by_restarts, story.kept_steps, story.allowed) == (0, 0, 20, None)


def test_run_when_killed_before_its_first_step_then_all_is_start_up_and_no_step_is_lost():
    books = Books().start(0)
    story = books.down(5).start(0).steps(2).stop().tell()
    assert _seconds(story) == {"productive": 4, "start-up": 60, "data": 2, "down": 5}
    assert story.failures == 0


def test_wall_clock_when_set_back_then_no_class_is_below_zero_and_the_sum_holds():
    books = Books().start(0).steps(10)
    books.wall_s -= 3600  # While it is down ...
    books.start(10).steps(5)
    books.wall_s -= 3600  # ... and while it works.
    books.steps(5).down(8)
    story = books.start(20).steps(5).stop().tell()
    assert story.seconds[DOWN] == pytest.approx(8) and story.seconds[OTHER] == 0
    assert story.total_s == pytest.approx(3 * 30 + 25 * 3 + 8)
    assert [start.down_s for start in story.starts] == [0, 0, pytest.approx(8)]


def test_rewind_when_told_then_the_steps_done_again_are_lost_by_it():
    books = Books().start(0).steps(18)
    books.add("rewind", from_step=18, to_step=10, a=12, b=18)
    books.step = 10
    story = books.steps(20).stop().tell()
    assert (story.kept_steps, story.lost_by_rewinds, story.lost_by_restarts) == (30, 8, 0)
    assert _seconds(story) == {"productive": 60, "lost": 16, "start-up": 30, "data": 38}
    [start] = story.starts
    assert (start.steps, start.lost, start.from_step, start.to_step) == (38, 8, 0, 30)
    assert story.allowed is None


def test_rewind_between_two_signs_when_told_then_the_time_is_shared_by_steps():
    books = Books().start(0).steps(10).steps(4, told=False)
    books.add("rewind", from_step=14, to_step=10, a=12, b=14)
    books.step = 10
    books.steps(5, told=False).steps(1)
    story = books.stop().tell()
    assert (story.kept_steps, story.lost_by_rewinds) == (16, 4)
    assert story.seconds[LOST] == pytest.approx(8) and story.seconds[PRODUCTIVE] == pytest.approx(32)


def test_rewind_when_a_later_start_goes_back_further_then_each_step_is_lost_once():
    books = Books().start(0).steps(18)
    books.add("rewind", from_step=18, to_step=10, a=12, b=18)
    books.step = 10
    books.steps(5).down(1)
    story = books.start(5).steps(15).stop().tell()
    assert (story.kept_steps, story.lost_by_rewinds, story.lost_by_restarts) == (20, 8, 10)
    assert [start.lost for start in story.starts] == [18, 0]


def test_restart_before_the_same_step_twice_when_told_then_lost_steps_add_up():
    books = Books().start(0).steps(15).down(1).start(10).steps(5).down(1)
    story = books.start(10).steps(10).stop().tell()
    assert (story.kept_steps, story.lost_by_restarts) == (20, 10)
    assert sum(start.lost for start in story.starts) == 10


def test_restart_when_a_start_further_back_follows_one_in_order_then_both_lose():
    books = Books().start(0).steps(17).stop(75)
    books.start(17).steps(3).down(1)  # Loses nothing; then all later checkpoints turn out to be damaged.
    story = books.start(5).steps(15).stop().tell()
    assert [start.lost for start in story.starts] == [12, 3, 0]
    assert (story.kept_steps, story.lost_by_restarts) == (20, 15)


@pytest.mark.parametrize("seed", range(30))
def test_any_run_when_told_then_the_steps_that_count_are_those_from_the_first_to_the_last(seed):
    chance = random.Random(seed)
    books, done = Books(), 0
    for _ in range(chance.randint(1, 8)):
        books.start(chance.randint(0, books.step) if books.events else 0)
        for _ in range(chance.randint(0, 6)):
            count = chance.randint(0, 9)
            books.steps(count, told=chance.random() < 0.5)
            done += count
            if chance.random() < 0.3:
                to_step = chance.randint(0, books.step)
                books.add("rewind", from_step=books.step, to_step=to_step, a=0, b=1)
                books.step = to_step
            if chance.random() < 0.2:
                books.wall_s += chance.uniform(-100, 100)
        books.spend(chance.uniform(0, 5))
        books.add("evaluation", seconds=1.0, eval_loss=1.0)  # So that all steps are known.
    story = books.tell()
    assert story.kept_steps == books.step
    assert story.kept_steps + story.lost_by_restarts + story.lost_by_rewinds == done
    assert sum(start.lost for start in story.starts) == story.lost_by_restarts + story.lost_by_rewinds


def test_end_of_a_start_when_after_its_last_sums_then_told_from_single_events():
    books = Books().start(0).steps(10)
    books.steps(2, told=False)
    books.spend(7)
    books.add("evaluation", seconds=7.0, eval_loss=1.0)
    story = books.stop(3).tell()
    assert story.starts[0].ended == "guard" and story.kept_steps == 12
    assert _seconds(story) == {"productive": 24, "start-up": 30, "data": 10, "evaluation": 7, "other": 2}


def test_hang_when_told_then_its_time_is_no_step_and_the_start_failed():
    books = Books().start(0).steps(10)
    books.spend(600)
    books.add("hang", step=11, what="data", file="hang.txt")
    story = books.down(10).start(10).steps(10).stop().tell()
    assert story.starts[0].ended == "hung" and story.starts[0].why == "waiting for data"
    assert story.seconds[OTHER] == pytest.approx(600)
    assert (story.kept_steps, story.lost_by_restarts, story.failures) == (20, 0, 1)


def test_start_when_a_device_failed():
    """Its code is that of a stop on request, and it is none."""
    books = Books().start(0).steps(10)
    books.add("device_failure", status="INTERNAL: Core halted", file="hangs/11.txt")
    story = books.stop(75).down(10).start(10).steps(10).stop().tell()
    assert (story.starts[0].ended, story.starts[0].code, story.failures) == ("device failure", 75, 1)


def test_signs_when_rare_then_what_may_be_unseen_is_said_and_taken_as_lost():
    books = Books().start(0)
    for _ in range(4):
        books.steps(4, told=False).steps(1)
    story = books.down(15).start(20).steps(20).stop().tell()
    assert (story.lost_by_restarts, story.unseen_most) == (0, 4)
    assert story.allowed.reached_steps == pytest.approx((40 / 44) / (40 / 45))


def test_two_starts_when_their_lines_mix_then_told_apart():
    first = Books().start(0).steps(5)
    second = Books(1100.0)
    second.runs = 1
    second.start(5).steps(5).stop()
    tangled = [*first.events[:-1], second.events[0], first.events[-1], *second.events[1:]]
    story = tell(tangled)
    assert [start.steps for start in story.starts] == [5, 5]
    assert sum(story.seconds.values()) == pytest.approx(story.starts[-1].end_s)


@pytest.fixture(scope="module")
def drill():
    spec = importlib.util.spec_from_file_location("goodput_drill", DRILL)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("log_every", [1, 5])
def test_drill_when_a_failure_comes_every_100_steps_then_above_95_percent_of_what_saving_allows(
    tmp_path, drill, log_every
):
    run = drill.Run(steps=3000, log_every=log_every)
    truth = drill.simulate(run, tmp_path, seed=1)
    found = drill.figures(tell(read_events(tmp_path)), truth)
    assert drill.faults(found, log_every) == []
    assert 20 < truth.failures < 45 and found["steps_that_count"] == 3000
    assert 0.95 < found["steps_reached"] < 1.05 and 0.95 < found["goodput_reached"] < 1.05


def test_drill_when_saves_become_whole_too_late_then_it_fails(tmp_path, drill):
    run = drill.Run(steps=3000, commit_s=9.0)  # A whole interval: twice the mean is lost.
    truth = drill.simulate(run, tmp_path, seed=1)
    found = drill.figures(tell(read_events(tmp_path)), truth)
    assert any("steps_reached" in fault for fault in drill.faults(found, run.log_every))
