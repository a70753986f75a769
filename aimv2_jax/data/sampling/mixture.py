"""Mixture sampler: pure functions from example number to (source, record, caption kind), without reading data.

Weights form an exact integer cycle over the sources, and each source has a cycle over its caption kinds; both are
interleaved as evenly as integers allow. Each caption kind of a source is its own pool, as in the paper's table of the
mixture: every pass visits all records in a new order, and a record with several captions shows a different one.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator, Mapping
from typing import NamedTuple

import numpy as np
from jaxtyping import Int32

from aimv2_jax.data.sampling.counter_rng import hash32, permute_index
from aimv2_jax.data.sampling.schedule import BatchSchedule

MAX_ATTEMPTS = 1024
"""Records of a source tried for one example before the run is aborted."""


class Draw(NamedTuple):
    """The `number`-th draw from the captions of kind `kind` of the source called `source`."""

    source: str
    number: int
    kind: str


class MixtureSampler:
    """Draws the examples of a run.

    Args:
      seed: the run's seed.
      schedule: the batch size of each step.
      sizes: number of records of each source, by name.
      counts: for each source, how often each caption kind occurs in one cycle (`config.mixture_counts`).
    """

    def __init__(
        self, seed: int, schedule: BatchSchedule, sizes: Mapping[str, int], counts: Mapping[str, Mapping[str, int]]
    ):
        self.seed = seed
        self.schedule = schedule
        # Sorted, so that draws do not depend on the order in which a config lists the sources.
        self._names = sorted(counts)
        self._sizes = {name: int(sizes[name]) for name in self._names}
        self._cycle = interleave([sum(counts[name].values()) for name in self._names])
        self._rank = _rank(self._cycle)
        self._weights = np.bincount(self._cycle, minlength=len(self._names))
        self._kinds = {name: _KindCycle(counts[name]) for name in self._names}

    @property
    def cycle_length(self) -> int:
        """Number of examples after which every source and kind has had exactly its weight."""
        return len(self._cycle)

    def epochs(self, steps: int) -> dict[str, float]:
        """Passes over each source in the first `steps` steps, all its kinds together."""
        cycles, slots = divmod(self.schedule.first_example(steps), len(self._cycle))
        drawn = [cycles * int(weight) for weight in self._weights]
        part = np.bincount(self._cycle[:slots], minlength=len(self._names))
        return {name: (drawn[i] + int(part[i])) / self._sizes[name] for i, name in enumerate(self._names)}

    def draw(self, example: int) -> Draw:
        """The draw of example number `example`."""
        cycle, slot = divmod(example, len(self._cycle))
        source = int(self._cycle[slot])
        name, number = self._names[source], cycle * int(self._weights[source]) + int(self._rank[slot])
        kind, number = self._kinds[name].draw(number)
        return Draw(name, number, kind)

    def records(self, draw: Draw) -> Iterator[int]:
        """The records to try for `draw`: its own, then replacements; all different, at most `MAX_ATTEMPTS`."""
        size = self._sizes[draw.source]
        epoch, position = divmod(draw.number, size)
        first = permute_index(position, size, hash32(self.seed, "epoch", draw.source, draw.kind, epoch))
        yield first
        seed = hash32(self.seed, "replacement", draw.source, draw.kind, draw.number)
        for attempt in range(min(size, MAX_ATTEMPTS) - 1):
            other = permute_index(attempt, size - 1, seed)
            yield other + (other >= first)

    def caption(self, draw: Draw, record: int, count: int) -> int:
        """Index of the caption, of the `count` of its kind, that `record` shows for `draw`.

        Each pass over the records takes the next caption, from a start that the seed chooses for each record. So in
        every pass each caption of a record is equally likely, and in `count` passes each comes once; as many
        independent choices would miss a quarter of two captions, and a fraction of 1/e of many.
        """
        start = hash32(self.seed, "caption", draw.source, draw.kind, record)
        return (start + draw.number // self._sizes[draw.source]) % count


class _KindCycle:
    """A source's cycle over its caption kinds, given how often each occurs in it."""

    def __init__(self, counts: Mapping[str, int]):
        self._kinds = sorted(counts)
        self._counts = [counts[kind] for kind in self._kinds]
        self._cycle = interleave(self._counts)
        self._rank = _rank(self._cycle)

    def draw(self, number: int) -> tuple[str, int]:
        """The kind of the source's `number`-th draw, and how many draws of that kind came before."""
        cycle, slot = divmod(number, len(self._cycle))
        kind = int(self._cycle[slot])
        return self._kinds[kind], cycle * self._counts[kind] + int(self._rank[slot])


def interleave(counts: list[int]) -> Int32[np.ndarray, " W"]:
    """A sequence of W = sum(counts) slots with exactly counts[i] times the value i, spread as evenly as possible.

    The j-th occurrence (from 0) of i lies in the slots [floor(j W / c), ceil((j + 1) W / c)), c = counts[i]; taking the
    earliest end first satisfies all of them (one processor, unit tasks, integer windows, full use: Baruah et al. 1996,
    "Proportionate progress"). So after t slots of repeated cycles, i has occurred t c / W times with an error
    below 1, and in any window with an error below 2.
    """
    total = sum(counts)
    order = np.empty(total, np.int32)
    waiting = [(0, i, 0) for i, count in enumerate(counts) if count]  # (first slot, i, j)
    ready: list[tuple[int, int, int]] = []  # (end, i, j)
    heapq.heapify(waiting)
    for slot in range(total):
        while waiting and waiting[0][0] <= slot:
            _, i, j = heapq.heappop(waiting)
            heapq.heappush(ready, (-(-(j + 1) * total // counts[i]), i, j))
        end, i, j = heapq.heappop(ready)
        assert slot < end
        order[slot] = i
        if j + 1 < counts[i]:
            heapq.heappush(waiting, ((j + 1) * total // counts[i], i, j + 1))
    return order


def _rank(cycle: Int32[np.ndarray, " W"]) -> Int32[np.ndarray, " W"]:
    """For each slot, how often its value occurs earlier in the cycle."""
    rank = np.empty_like(cycle)
    for value in np.unique(cycle):
        slots = np.flatnonzero(cycle == value)
        rank[slots] = np.arange(len(slots))
    return rank
