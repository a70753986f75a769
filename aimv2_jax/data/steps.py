"""How large each step's batch is: step numbers to (examples, patches), as pure functions that read no byte.

At a fixed resolution all steps are alike. At native resolution each step has an area: the most patches that a picture
may have. Areas are dealt in blocks of steps, each a new order of the same counts, so which examples a step has follows
from a division and one block.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Sequence

import numpy as np
from jaxtyping import Int

from aimv2_jax.config import BatchShape
from aimv2_jax.data.chance import hash32, permutation

BLOCK = 1000
"""Steps of a block."""


class Steps:
    """The batch of every step of a run.

    Args:
      seed: the run's seed.
      shapes: those that batches may have, by rising area; how often each comes: `counts_in_block`.
    """

    def __init__(self, seed: int, shapes: Sequence[BatchShape]):
        self._seed, self._shapes = seed, tuple(shapes)
        self._counts = (BLOCK,) if len(self._shapes) == 1 else tuple(counts_in_block(len(self._shapes)))
        examples = [shape.examples for shape in self._shapes]
        self._examples_per_block = sum(count * size for count, size in zip(self._counts, examples))
        self._block = functools.lru_cache(maxsize=2)(self._deal)  # Steps come in order, read ahead by a few.

    def __reduce__(self):
        return Steps, (self._seed, self._shapes)

    def shape(self, step: int) -> BatchShape:
        """The batch of `step`."""
        block, place = divmod(step, BLOCK)
        return self._shapes[self._block(block)[0][place]]

    def first_example(self, step: int) -> int:
        """The number of the first example of `step`; its others follow."""
        block, place = divmod(step, BLOCK)
        return block * self._examples_per_block + int(self._block(block)[1][place])

    def _deal(self, block: int) -> tuple[Int[np.ndarray, " S"], Int[np.ndarray, " S"]]:
        """Which shape each step of a block has, and how many examples come before it in the block."""
        which = np.repeat(np.arange(len(self._shapes)), self._counts)
        which = which[permutation(BLOCK, hash32(self._seed, "areas", block))]
        examples = np.array([shape.examples for shape in self._shapes])[which]
        return which, np.cumsum(examples) - examples


def counts_in_block(num_areas: int) -> list[int]:
    """How many steps of a block have each of `num_areas` areas: their shares by largest remainder.

    A standard normal number truncated to [-1, 1] is mapped linearly to [0, num_areas - 1] and rounded (RECIPE.md §9):
    for the areas 2^7 … 2^12 that is the paper's draw of the exponent.
    """
    middle = (num_areas - 1) / 2
    cuts = [-1.0, *((place + 0.5 - middle) / middle for place in range(num_areas - 1)), 1.0]
    below = [math.erf(cut / math.sqrt(2)) for cut in cuts]
    exact = [BLOCK * (high - low) / (below[-1] - below[0]) for low, high in itertools.pairwise(below)]
    counts = [math.floor(share) for share in exact]
    by_remainder = sorted(range(num_areas), key=lambda place: (counts[place] - exact[place], place))
    for place in by_remainder[: BLOCK - sum(counts)]:
        counts[place] += 1
    return counts
