"""Batch-size schedule: exact counts of areas in every block, a constant number of patches, random access."""

import collections
import itertools
import pickle
import time

import numpy as np
import pytest

from aimv2_jax.config.schema import BatchShape
from aimv2_jax.data.sampling.schedule import BLOCK, BatchSchedule, counts_in_block

SHAPES = [BatchShape(2**20 // area, area) for area in (128, 256, 512, 1024, 2048, 4096)]


def integrated_counts(num_areas: int) -> list[float]:
    """Shares of the rounded, linearly mapped truncated normal by numerical integration, times BLOCK."""
    n = (np.arange(2_000_000) + 0.5) / 1_000_000 - 1
    area = np.rint((n + 1) / 2 * (num_areas - 1)).astype(int)
    mass = np.bincount(area, np.exp(-(n**2) / 2), minlength=num_areas)
    return list(BLOCK * mass / mass.sum())


@pytest.mark.parametrize("num_areas", [2, 3, 5, 6, 7])
def test_counts_when_any_number_of_areas_then_the_integrated_shares_by_largest_remainder(num_areas):
    counts, exact = counts_in_block(num_areas), integrated_counts(num_areas)
    assert sum(counts) == BLOCK
    assert all(np.floor(share - 1e-3) <= count <= np.ceil(share + 1e-3) for count, share in zip(counts, exact))
    raised, others = (
        [share % 1 for count, share in zip(counts, exact) if (count > share) == up] for up in (True, False)
    )
    assert min(raised, default=1) >= max(others, default=0) - 1e-3  # The shares are symmetric, so there are ties.


def test_areas_of_the_paper_when_dealt_then_these_counts_in_every_block_in_every_seeds_own_order():
    assert counts_in_block(6) == [78, 194, 228, 228, 194, 78]
    orders = []
    for seed, block in itertools.product((0, 1, 2**31 - 1), (0, 1, 1000)):
        schedule = BatchSchedule(seed, SHAPES)
        shapes = [schedule.shape(block * BLOCK + offset) for offset in range(BLOCK)]
        counts = collections.Counter(shape.patches for shape in shapes)
        assert [counts[shape.patches] for shape in SHAPES] == [78, 194, 228, 228, 194, 78]
        assert all(shape.examples * shape.patches == 2**20 for shape in shapes)
        orders.append(tuple(shapes))
    assert len(set(orders)) == len(orders)


def test_first_example_when_compared_with_a_sum_over_all_steps_before_then_equal():
    schedule = BatchSchedule(7, SHAPES)
    sizes = [schedule.shape(step).examples for step in range(2 * BLOCK + 300)]
    assert [schedule.first_example(step) for step in range(len(sizes) + 1)] == [0, *itertools.accumulate(sizes)]


def test_step_a_million_when_asked_first_then_at_once_and_exact():
    schedule = BatchSchedule(3, SHAPES)
    schedule.shape(0)  # Loads numpy's generator.
    start = time.perf_counter()
    first = schedule.first_example(1_000_000)
    assert time.perf_counter() - start < 0.05
    per_block = sum(count * shape.examples for count, shape in zip(counts_in_block(6), SHAPES))
    assert first == 1000 * per_block


def test_fixed_resolution_when_asked_then_all_steps_are_alike():
    schedule = BatchSchedule(3, [BatchShape(8, 4)])
    assert {schedule.shape(step) for step in range(2000)} == {BatchShape(8, 4)}
    assert schedule.first_example(10**12) == 8 * 10**12


def test_steps_when_sent_to_a_worker_then_the_same():
    schedule = BatchSchedule(5, SHAPES)
    other = pickle.loads(pickle.dumps(schedule))
    assert [other.shape(step) for step in range(1500)] == [schedule.shape(step) for step in range(1500)]
