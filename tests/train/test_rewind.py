"""Where a run goes back to."""

import pytest

from aimv2_jax.data.skips import Skips
from aimv2_jax.train.rewind import Rewind, Spike, plan_rewind


@pytest.mark.parametrize(
    ("step", "saved", "batches", "expected"),
    [
        (55, [10, 20, 30, 40, 50], 20, Rewind(30, 35, 55)),  # Steps 31 to 35 come again.
        (55, [10, 20, 30, 40, 50, 60], 1, Rewind(50, 54, 55)),
        (55, [50], 20, Rewind(50, 50, 55)),  # As far as it goes back.
        (15, [0], 200, Rewind(0, 0, 15)),
    ],
)
def test_rewind_when_planned_then_from_the_newest_step_that_saw_none_of_the_batches(step, saved, batches, expected):
    assert plan_rewind(Spike(step, step - 1, "told"), saved, Skips(), batches) == expected


def test_rewind_when_batches_were_jumped_over_before_then_counted_in_batches():
    skips = Skips(((35, 55),))  # Step 51 trains on batch 70.
    assert plan_rewind(Spike(51, skips.batch(50), "told"), [30, 40, 50], skips, 10) == Rewind(40, 61, 71)
