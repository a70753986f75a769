"""Batch-size schedule: pure functions from step to (examples, patches), without reading data.

At a fixed resolution all steps are alike. At native resolution each step has an area: the maximum number of patches of
an image. Blocks of steps hold every area a fixed number of times, in a new order per block, so the examples of a step
follow from a division and one block.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Sequence

import numpy as np
from jaxtyping import Int

from aimv2_jax.config import BatchShape
from aimv2_jax.data.sampling.counter_rng import hash32, permutation

BLOCK = 1000
"""Number of steps in a block."""


class BatchSchedule:
    """The batch shape of every step of a run.

    Args:
      seed: the run's seed.
      shapes: the possible batch shapes, by rising area; `counts_in_block` gives how often each occurs.
    """

    def __init__(self, seed: int, shapes: Sequence[BatchShape]):
        self._seed = seed
        self._shapes = tuple(shapes)
        self._counts = (BLOCK,) if len(self._shapes) == 1 else tuple(counts_in_block(len(self._shapes)))
        examples = [shape.examples for shape in self._shapes]
        self._examples_per_block = sum(count * size for count, size in zip(self._counts, examples))
        self._block = functools.lru_cache(maxsize=2)(
            self._shuffle_block
        )  # Steps come in order, a few of them read ahead.

    def __reduce__(self):
        return BatchSchedule, (self._seed, self._shapes)

    def shape(self, step: int) -> BatchShape:
        """The batch shape of `step`."""
        block, offset = divmod(step, BLOCK)
        return self._shapes[self._block(block)[0][offset]]

    def first_example(self, step: int) -> int:
        """The number of the first example of `step`; its other examples follow."""
        block, offset = divmod(step, BLOCK)
        return block * self._examples_per_block + int(self._block(block)[1][offset])

    def _shuffle_block(self, block: int) -> tuple[Int[np.ndarray, " S"], Int[np.ndarray, " S"]]:
        """The shape index of each step of a block, and the number of examples before it in the block."""
        shape_index = np.repeat(np.arange(len(self._shapes)), self._counts)
        shape_index = shape_index[permutation(BLOCK, hash32(self._seed, "areas", block))]
        examples = np.array([shape.examples for shape in self._shapes])[shape_index]
        return shape_index, np.cumsum(examples) - examples


def counts_in_block(num_areas: int) -> list[int]:
    """Number of steps in a block for each of `num_areas` areas: their shares, rounded by largest remainder.

    A standard normal number truncated to [-1, 1] is mapped linearly to [0, num_areas - 1] and rounded (RECIPE.md §9):
    for the areas 2^7 … 2^12 that is the paper's draw of the exponent.
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
