"""Short form of the drill with killed runs: tests/stress/kill.py."""

from __future__ import annotations

import pytest

from tests.stress import kill

# Tests with worker processes run one after another: in parallel they would starve those with time limits.
pytestmark = pytest.mark.xdist_group("data workers")


@pytest.mark.parametrize("kills", [3, pytest.param(10, marks=pytest.mark.slow)])
def test_run_when_killed_again_and_again(tmp_path, kills):
    """Its metrics are those of an uninterrupted run, and no process or file is left over."""
    report = kill.drill(kills, seed=1, folder=tmp_path)
    assert {one["when"] for one in report["kills"]} == set(kill.WHEN) and len(report["kills"]) == kills
    assert report["steps"] > kill.SAVE_EVERY and report["numbers_compared"] > 100_000
    assert all(one["processes"] > 2 for one in report["kills"] if one["when"] != "starting")
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
def test_check_limits_the_lost_steps(step, saved, saving, lost, fits):
    """At most the steps between two saves may be lost, and twice as many while the next save is in progress."""
    one = kill.Kill("training", 1.0, step, saved, saving, lost, processes=3, gone_after_s=0.0, started_s=0.5)
    if fits:
        one.check(20)
    else:
        with pytest.raises(AssertionError, match="too much lost"):
            one.check(20)
