"""Tests of the rewind plan: the restored step and the skipped batches."""

import pytest

from aimv2_jax.data.sampling.skips import Skips
from aimv2_jax.resilience.rewind import Rewind, Spike, plan_rewind


@pytest.mark.parametrize(
    ("step", "saved", "batches", "expected"),
    [
        (55, [10, 20, 30, 40, 50], 20, Rewind(30, 35, 55)),  # Steps 31 to 35 are repeated.
        (55, [10, 20, 30, 40, 50, 60], 1, Rewind(50, 54, 55)),
        (55, [50], 20, Rewind(50, 50, 55)),  # The oldest saved step.
        (15, [0], 200, Rewind(0, 0, 15)),
    ],
)
def test_rewind_when_planned_then_from_the_newest_step_that_saw_none_of_the_batches(step, saved, batches, expected):
    assert plan_rewind(Spike(step, step - 1, "message"), saved, Skips(), batches) == expected


def test_rewind_when_batches_were_jumped_over_before_then_counted_in_batches():
    skips = Skips(((35, 55),))  # Step 51 trains on batch 70.
    assert plan_rewind(Spike(51, skips.batch(50), "message"), [30, 40, 50], skips, 10) == Rewind(40, 61, 71)
