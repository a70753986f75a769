"""Short form of the drill with killed runs: experiments/drills/kill.py."""

from __future__ import annotations

import pytest

from experiments.drills import kill

# Tests with worker processes run one after another: in parallel they would starve those with time limits.
pytestmark = pytest.mark.xdist_group("shared-memory")


@pytest.mark.parametrize("kills", [4, pytest.param(10, marks=pytest.mark.slow)])
def test_run_when_killed_again_and_again(tmp_path, kills):
    """Its metrics are those of an uninterrupted run, and no process or file is left over."""
    report = kill.drill(kills, seed=1, folder=tmp_path)
    assert {one["when"] for one in report["kills"]} == set(kill.WHEN) and len(report["kills"]) == kills
    assert report["steps"] > kill.SAVE_EVERY and report["numbers_compared"] > 100_000
    assert sum(one["met"] > 2 and one["shared"] > 2 for one in report["kills"]) >= 0.7 * kills
    assert report["while_saving"] and report["most_lost"] > 0


@pytest.mark.parametrize(
    ("step", "saved", "saving", "lost", "fits"),
    [
        (39, 20, None, 19, True),
        (45, 20, 40, 25, True),
        (60, 20, 40, 40, True),
        (61, 20, 40, 41, False),
        (45, 20, None, 25, False),
        (65, 20, 60, 45, False),
    ],
)
def test_kill_when_more_is_lost_than_lies_between_saves_and_in_one_then_it_fails(step, saved, saving, lost, fits):
    one = kill.Kill("training", 1.0, step, saved, saving, lost, met=3, shared=0, gone_after_s=0.0)
    if fits:
        one.check(20)
    else:
        with pytest.raises(AssertionError, match="too much lost"):
            one.check(20)
