"""Short form of the drill with hanging runs: tests/stress/hang.py."""

from __future__ import annotations

import pytest

from aimv2_jax.monitoring.events import read_events
from tests.stress import hang

# Tests with worker processes run one after another: in parallel they would starve those with time limits.
pytestmark = pytest.mark.xdist_group("data workers")
# A data worker's imports must fit into the timeout, too.
TIMEOUTS_S = {"worker": 10.0, "step": 3.0, "save": 3.0, "stop": 3.0}
AT_LENGTH = [("worker", 2), ("save", 1), ("save", 2), ("stop", 1), ("stop", 2)]
AT_LENGTH = [pytest.param(*case, marks=pytest.mark.slow) for case in AT_LENGTH]


@pytest.mark.parametrize(("what", "starts"), [("worker", 1), ("step", 2), *AT_LENGTH])
def test_run_when_it_hangs(tmp_path, what, starts):
    """Stacks are written in time; the exit code is 75, and 4 for a second hang at the same step."""
    hung = hang.hang_at_one_step(tmp_path, what, stall_s=300.0, timeout_s=TIMEOUTS_S[what], starts=starts)
    assert hung.codes == (75, 4)[:starts] and hung.threads >= 4  # The drill itself checks that stacks come in time.
    events = read_events(tmp_path / what)
    hangs = [event for event in events if event.kind == "hang"]
    assert len(hangs) == starts and len({event.step for event in hangs}) == 1 and hangs[0].step > 0
    assert {event.values["what"] for event in hangs} == {{"worker": "data"}.get(what, what)}
    assert (events[-1].kind, events[-1].values["code"]) == ("stop", hung.codes[-1])


@pytest.mark.slow
def test_worker_when_it_stalls_once_then_it_is_started_again_and_the_run_finishes(tmp_path):
    """Short forms: the restart in `worker` above, and the same examples in data/loading/test_batch_iterator.py."""
    hang.stall_once(tmp_path, timeout_s=15.0)
