"""The short form of the drill that lets runs hang: experiments/drills/hang.py."""

from __future__ import annotations

import pytest

from aimv2_jax.train.events import read_events
from experiments.drills import hang

# Tests with worker processes run one after another: several at a time would starve those that watch the clock.
pytestmark = [pytest.mark.xdist_group("shared-memory"), pytest.mark.slow]
# A data worker has to import what it needs within the time-out, too.
TIMEOUTS_S = {"worker": 10.0, "step": 3.0, "save": 3.0, "stop": 3.0}


@pytest.mark.parametrize("what", TIMEOUTS_S)
def test_run_when_it_hangs_twice_at_one_step_then_stacks_in_time_and_75_and_then_4(tmp_path, what):
    hung = hang.hang_twice(tmp_path, what, stall_s=300.0, timeout_s=TIMEOUTS_S[what])
    assert hung.codes == (75, 4) and hung.threads > 4  # Whether stacks came in time, the drill itself has looked.
    [first, second] = [event for event in read_events(tmp_path / what) if event.kind == "hang"]
    assert first.step == second.step > 0 and first.values["what"] == {"worker": "data"}.get(what, what)
    last = read_events(tmp_path / what)[-1]
    assert (last.kind, last.values["code"]) == ("stop", 4)


def test_worker_when_it_stalls_once_then_it_is_started_again_and_the_run_finishes(tmp_path):
    hang.stall_once(tmp_path, timeout_s=20.0)
