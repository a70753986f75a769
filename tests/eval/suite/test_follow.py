"""Steps of a run as they appear."""

from __future__ import annotations

import pytest

from aimv2_jax.errors import UserError
from aimv2_jax.eval.suite import follow


def test_new_steps_appear_in_order(tmp_path, monkeypatch):
    """Each step is yielded once, as it appears, also after others were deleted; the last one ends the run."""
    seen_by_poll = [[], [10], [10, 20], [30, 40], [30, 40], [30, 40]]
    polls, waits, lines = iter(seen_by_poll), [], []

    class Reader:
        def __init__(self, workdir):
            pass

        def steps(self):
            return next(polls)

    monkeypatch.setattr(follow, "CheckpointReader", Reader)
    monkeypatch.setattr(follow, "is_last", lambda workdir, step: step == 40)
    assert list(follow.new_steps(tmp_path, 5.0, lines.append, waits.append)) == [10, 20, 30, 40]
    assert waits == [5.0] and lines == [f"waiting for the next checkpoint of {tmp_path}"]


def test_last_step_is_that_of_the_config(workdir):
    """A run ends at its config's last step; a step that is gone ends nothing."""
    assert not follow.is_last(workdir, 40) and not follow.is_last(workdir, 7)
    with pytest.raises(UserError, match="--follow: no such folder"):
        next(follow.new_steps(workdir / "none", 1.0))
