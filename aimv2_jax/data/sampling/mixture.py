"""Mixture sampler: pure functions from example number to (source, record, caption kind), without reading data.

The config's weights are scaled to integers. Examples cycle over the sources, and the draws from a source cycle over its
caption kinds. A cycle has each value exactly as often as its weight, spread as evenly as possible (`interleave`). Each
caption kind of a source is a pool of its own, as in the paper's table of the mixture. Each pass over a pool visits all
records in a new order, and shows another caption of a record that has several.
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
      counts: for each source, how often each caption kind occurs in one cycle (`mixture_counts` of config/schema.py).
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

    def epochs(self, steps: int) -> dict[str, float]:
        """Returns the passes over each source in the first `steps` steps, counting the draws of all its kinds."""
        cycles, slots = divmod(self.schedule.first_example(steps), len(self._cycle))
        drawn = [cycles * int(weight) for weight in self._weights]
        part = np.bincount(self._cycle[:slots], minlength=len(self._names))
        return {name: (drawn[i] + int(part[i])) / self._sizes[name] for i, name in enumerate(self._names)}

    def draw(self, example: int) -> Draw:
        """Returns the draw of example number `example`."""
        cycle, slot = divmod(example, len(self._cycle))
        source = int(self._cycle[slot])
        name, number = self._names[source], cycle * int(self._weights[source]) + int(self._rank[slot])
        kind, number = self._kinds[name].draw(number)
        return Draw(name, number, kind)

    def records(self, draw: Draw) -> Iterator[int]:
        """Yields up to `MAX_ATTEMPTS` different records to try for `draw`: its own first, then replacements."""
        size = self._sizes[draw.source]
        epoch, position = divmod(draw.number, size)
        first = permute_index(position, size, hash32(self.seed, "epoch", draw.source, draw.kind, epoch))
        yield first
        seed = hash32(self.seed, "replacement", draw.source, draw.kind, draw.number)
        for attempt in range(min(size, MAX_ATTEMPTS) - 1):
            other = permute_index(attempt, size - 1, seed)
            yield other + (other >= first)

    def caption(self, draw: Draw, record: int, count: int) -> int:
        """Returns the index of the caption that `record` shows for `draw`, among its `count` captions of that kind.

        The first pass starts at a random caption of each record, and each further pass takes the next one. So in every
        pass all captions of a record are equally likely, and `count` passes show each of them once. With `count`
        independent choices instead, a caption would be missed with probability 1/4 for two captions, 1/e for many.
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
        """Returns the kind of the source's `number`-th draw, and how many draws of that kind came before."""
        cycle, slot = divmod(number, len(self._cycle))
        kind = int(self._cycle[slot])
        return self._kinds[kind], cycle * self._counts[kind] + int(self._rank[slot])


def interleave(counts: list[int]) -> Int32[np.ndarray, " W"]:
    """Returns W = sum(counts) slots that hold the value i exactly counts[i] times, spread as evenly as possible.

    With c = counts[i], the j-th occurrence of i (from 0) is in the slots [floor(j W / c), ceil((j + 1) W / c)). The
    value whose window ends first comes next, which meets all windows (Baruah et al. 1996, "Proportionate progress": one
    fully used processor, unit tasks, integer windows). So in the first t slots of repeated cycles, i occurs t c / W
    times with an error below 1. In any t consecutive slots, the error is below 2.
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
    """Returns, for each slot, how often its value occurs earlier in the cycle."""
    rank = np.empty_like(cycle)
    for value in np.unique(cycle):
        slots = np.flatnonzero(cycle == value)
        rank[slots] = np.arange(len(slots))
    return rank
