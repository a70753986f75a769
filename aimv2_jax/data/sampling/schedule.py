"""Batch-size schedule: pure functions from step to (examples, patches), without reading data.

At a fixed resolution all steps have the same shape. At native resolution each step has an area: the maximum number of
patches of an image. A block of steps has every area a fixed number of times, in an order of its own. All blocks have
equally many examples, so the first example of a step is found from its block alone.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Sequence

import numpy as np
from jaxtyping import Int

from aimv2_jax.config.schema import BatchShape
from aimv2_jax.data.sampling.counter_rng import hash32, permutation

BLOCK = 1000
"""Number of steps in a block."""


class BatchSchedule:
    """The batch shape of every step of a run.

    Args:
      seed: the run's seed.
      shapes: the possible batch shapes, in order of rising area; `counts_in_block` says how often each occurs.
    """

    def __init__(self, seed: int, shapes: Sequence[BatchShape]):
        self._seed = seed
        self._shapes = tuple(shapes)
        self._counts = counts_in_block(len(self._shapes))
        examples = [shape.examples for shape in self._shapes]
        self._examples_per_block = sum(count * size for count, size in zip(self._counts, examples))
        # Two blocks are enough: steps are asked for in order, up to the few that are read ahead.
        self._block = functools.lru_cache(maxsize=2)(self._shuffle_block)

    def __reduce__(self):
        return BatchSchedule, (self._seed, self._shapes)

    def shape(self, step: int) -> BatchShape:
        """Returns the batch shape of `step`."""
        block, offset = divmod(step, BLOCK)
        return self._shapes[self._block(block)[0][offset]]

    def first_example(self, step: int) -> int:
        """Returns the number of the first example of `step`; the others are numbered consecutively."""
        block, offset = divmod(step, BLOCK)
        return block * self._examples_per_block + int(self._block(block)[1][offset])

    def _shuffle_block(self, block: int) -> tuple[Int[np.ndarray, " S"], Int[np.ndarray, " S"]]:
        """Returns the shape index of each step of a block, and the number of examples before it in the block."""
        shape_index = np.repeat(np.arange(len(self._shapes)), self._counts)
        shape_index = shape_index[permutation(BLOCK, hash32(self._seed, "areas", block))]
        examples = np.array([shape.examples for shape in self._shapes])[shape_index]
        return shape_index, np.cumsum(examples) - examples


def counts_in_block(num_areas: int) -> list[int]:
    """Returns the number of steps in a block for each of `num_areas` areas.

    The probability of an area is that of its index when a standard normal number, truncated to [-1, 1], is mapped
    linearly to [0, num_areas - 1] and rounded (RECIPE.md §9). For the areas 2^7 … 2^12 this is how the paper draws the
    exponent. The counts are BLOCK times the probabilities, rounded by the largest-remainder method.
    """
    middle = (num_areas - 1) / 2
    cuts = [-1.0, *((area + 0.5 - middle) / middle for area in range(num_areas - 1)), 1.0]
    below = [math.erf(cut / math.sqrt(2)) for cut in cuts]
    exact = [BLOCK * (high - low) / (below[-1] - below[0]) for low, high in itertools.pairwise(below)]
    counts = [math.floor(share) for share in exact]
    by_remainder = sorted(range(num_areas), key=lambda area: (counts[area] - exact[area], area))
    for area in by_remainder[: BLOCK - sum(counts)]:
        counts[area] += 1
    return counts
