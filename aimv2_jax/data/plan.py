"""Who is in a batch: example numbers to (source, record, caption kind), as pure functions that read no byte.

Weights are an exact integer cycle over the sources, and each source has a cycle over its caption kinds; both are dealt
as evenly as integers allow. Each caption kind of a source is a pool of its own, as in the paper's table of the mixture:
it goes through all records in a new order every pass, and a record with several captions shows another one in each.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator, Mapping
from typing import NamedTuple

import numpy as np
from jaxtyping import Int32

from aimv2_jax.data.chance import hash32, shuffled
from aimv2_jax.data.steps import Steps

MAX_ATTEMPTS = 1024
"""Records of a source that are tried for one example before the source is given up."""


class Draw(NamedTuple):
    """The `number`-th draw from the captions of kind `kind` of the source called `source`."""

    source: str
    number: int
    kind: str


class Plan:
    """The examples of a run.

    Args:
      seed: the run's seed.
      steps: how many examples each step has.
      sizes: records of each source, by name.
      counts: for each source, how often each caption kind occurs in one cycle (`config.mixture_counts`).
    """

    def __init__(self, seed: int, steps: Steps, sizes: Mapping[str, int], counts: Mapping[str, Mapping[str, int]]):
        self.seed, self.steps = seed, steps
        # Sorted: the plan is a function of what is mixed, not of the order in which a config lists it.
        self._names = sorted(counts)
        self._sizes = {name: int(sizes[name]) for name in self._names}
        self._cycle = deal([sum(counts[name].values()) for name in self._names])
        self._rank = _rank(self._cycle)
        self._weights = np.bincount(self._cycle, minlength=len(self._names))
        self._kinds = {name: _KindCycle(counts[name]) for name in self._names}

    @property
    def cycle_length(self) -> int:
        """Examples after which every source and kind has had exactly its weight."""
        return len(self._cycle)

    def epochs(self, steps: int) -> dict[str, float]:
        """Passes over each source, all its kinds together, that the first `steps` steps make."""
        cycles, slots = divmod(self.steps.first_example(steps), len(self._cycle))
        drawn = [cycles * int(weight) for weight in self._weights]
        part = np.bincount(self._cycle[:slots], minlength=len(self._names))
        return {name: (drawn[i] + int(part[i])) / self._sizes[name] for i, name in enumerate(self._names)}

    def draw(self, example: int) -> Draw:
        """What example number `example` draws."""
        cycle, slot = divmod(example, len(self._cycle))
        source = int(self._cycle[slot])
        name, number = self._names[source], cycle * int(self._weights[source]) + int(self._rank[slot])
        kind, number = self._kinds[name].draw(number)
        return Draw(name, number, kind)

    def records(self, draw: Draw) -> Iterator[int]:
        """The records to try for `draw`: its own, then replacements, all of them different, `MAX_ATTEMPTS` at most."""
        size = self._sizes[draw.source]
        epoch, position = divmod(draw.number, size)
        first = shuffled(position, size, hash32(self.seed, "epoch", draw.source, draw.kind, epoch))
        yield first
        seed = hash32(self.seed, "replacement", draw.source, draw.kind, draw.number)
        for attempt in range(min(size, MAX_ATTEMPTS) - 1):
            other = shuffled(attempt, size - 1, seed)
            yield other + (other >= first)

    def caption(self, draw: Draw, record: int, count: int) -> int:
        """Which of the `count` captions of its kind `record` shows to `draw`.

        Each pass over the records takes the next one, from a start that the seed chooses for each record. So in every
        pass each caption of a record is equally likely, and in `count` passes each comes once; as many independent
        choices would leave out a quarter of two captions, and a share of 1/e of many.
        """
        start = hash32(self.seed, "caption", draw.source, draw.kind, record)
        return (start + draw.number // self._sizes[draw.source]) % count


class _KindCycle:
    """The cycle of a source over its caption kinds, given how often each occurs in it."""

    def __init__(self, counts: Mapping[str, int]):
        self._kinds = sorted(counts)
        self._counts = [counts[kind] for kind in self._kinds]
        self._cycle = deal(self._counts)
        self._rank = _rank(self._cycle)

    def draw(self, number: int) -> tuple[str, int]:
        """The kind of the source's `number`-th draw, and how many of that kind came before."""
        cycle, slot = divmod(number, len(self._cycle))
        kind = int(self._cycle[slot])
        return self._kinds[kind], cycle * self._counts[kind] + int(self._rank[slot])


def deal(counts: list[int]) -> Int32[np.ndarray, " W"]:
    """A sequence of W = sum(counts) slots that holds i exactly counts[i] times, as evenly spread as can be.

    The j-th occurrence (from 0) of i lies in the slots [floor(j W / c), ceil((j + 1) W / c)), c = counts[i]; taking the
    earliest end first meets all of them (one processor, unit tasks, integer windows, full use: Baruah et al. 1996,
    "Proportionate progress"). So after t slots of any number of such cycles, i has occurred t c / W times give or take
    less than 1, and within any window less than 2.
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
    """How often each slot's value occurs before it."""
    rank = np.empty_like(cycle)
    for value in np.unique(cycle):
        where = np.flatnonzero(cycle == value)
        rank[where] = np.arange(len(where))
    return rank
