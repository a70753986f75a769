"""Skipped batches: the map from step to batch."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aimv2_jax.config.schema import BatchShape
from aimv2_jax.data.sampling.schedule import BatchSchedule
from aimv2_jax.data.sampling.skips import Skips, batches_of, with_examples
from aimv2_jax.errors import UserError

NATIVE = [BatchShape(16, 8), BatchShape(8, 16), BatchShape(4, 32)]


@given(st.lists(st.tuples(st.integers(0, 40), st.integers(1, 9)), max_size=6))
def test_batches_when_some_are_skipped_then_steps_have_all_others_in_order(parts):
    skips = Skips()
    for first, length in parts:
        skips = skips.adding(first, first + length)
    skipped = {batch for first, length in parts for batch in range(first, first + length)}
    assert [skips.batch(step) for step in range(100)] == [b for b in range(200) if b not in skipped][:100]
    assert Skips.from_json(skips.as_json()) == skips
    assert all(skips.contains(first, first + length) for first, length in parts)


@given(st.integers(0, 20_000), st.integers(1, 300), st.sampled_from([[BatchShape(16, 4)], NATIVE]))
def test_examples_when_they_are_turned_into_batches_then_the_fewest_that_have_them_all(first, count, shapes):
    schedule = BatchSchedule(3, shapes)
    start, end = batches_of((first, first + count), schedule)
    assert schedule.first_example(start) <= first < schedule.first_example(start + 1)
    assert schedule.first_example(end - 1) < first + count <= schedule.first_example(end)


def test_examples_when_some_were_trained_on_then_refused_with_the_first_that_was_not():
    schedule = BatchSchedule(0, [BatchShape(16, 4)])
    assert with_examples(Skips(), (160, 200), schedule, done=10) == Skips(((10, 13),))
    with pytest.raises(
        UserError, match=r"trained on already, in the 11 saved steps: '160:200'\. Give examples from 176 on"
    ):
        with_examples(Skips(), (160, 200), schedule, done=11)
    with pytest.raises(UserError, match="Give examples from 208 on"):  # 12 steps trained on batches 0 to 9, 11 and 12.
        with_examples(Skips(((10, 11),)), (190, 200), schedule, done=12)


def test_examples_when_given_again_with_the_same_command_then_nothing_changes():
    schedule = BatchSchedule(0, [BatchShape(16, 4)])
    skips = with_examples(Skips(), (160, 200), schedule, done=10)
    assert with_examples(skips, (160, 200), schedule, done=25) is skips
