"""Who is in a batch: example numbers to (source, record, caption kind), as pure functions that read no byte.

Weights are an exact integer cycle over the sources, and each source has a cycle over its caption kinds; both are dealt
as evenly as integers allow. A source goes through all its records, in a new order, every epoch.
"""

from __future__ import annotations

import functools
import hashlib
import heapq
from collections.abc import Iterator, Mapping
from typing import NamedTuple

import numpy as np
from grain.experimental import index_shuffle
from jaxtyping import Int32

MAX_ATTEMPTS = 1024
"""Records of a source that are tried for one example before the source is given up."""

_SHUFFLE_ROUNDS = 4  # Grain's own choice for its global shuffle.
# index_shuffle walks through 2^16 codes to find one below a small size: 195 us at 209 records, 15 us at 4,096.
_TABLE_SIZE = 4096


class Draw(NamedTuple):
    """The `number`-th draw from the source called `source`, for its caption of kind `kind`."""

    source: str
    number: int
    kind: str


class Plan:
    """The examples of a run.

    Args:
      seed: the run's seed.
      batch_size: examples a step.
      sizes: records of each source, by name.
      counts: for each source, how often each caption kind occurs in one cycle (`config.mixture_counts`).
    """

    def __init__(self, seed: int, batch_size: int, sizes: Mapping[str, int], counts: Mapping[str, Mapping[str, int]]):
        self.seed, self.batch_size = seed, batch_size
        # Sorted: the plan is a function of what is mixed, not of the order in which a config lists it.
        self._names = sorted(counts)
        self._sizes = {name: int(sizes[name]) for name in self._names}
        self._cycle = deal([sum(counts[name].values()) for name in self._names])
        self._rank = _rank(self._cycle)
        self._weights = np.bincount(self._cycle, minlength=len(self._names))
        self._kinds = {}
        for name in self._names:
            kinds = sorted(counts[name])
            self._kinds[name] = [kinds[i] for i in deal([counts[name][kind] for kind in kinds])]

    @property
    def cycle_length(self) -> int:
        """Examples after which every source and kind has had exactly its weight."""
        return len(self._cycle)

    def first_example(self, step: int) -> int:
        """The number of the first example of `step`; its others follow."""
        return step * self.batch_size

    def epochs(self, steps: int) -> dict[str, float]:
        """Passes over each source that the first `steps` steps make."""
        cycles, slots = divmod(self.first_example(steps), len(self._cycle))
        drawn = [cycles * int(weight) for weight in self._weights]
        part = np.bincount(self._cycle[:slots], minlength=len(self._names))
        return {name: (drawn[i] + int(part[i])) / self._sizes[name] for i, name in enumerate(self._names)}

    def draw(self, example: int) -> Draw:
        """What example number `example` draws."""
        cycle, slot = divmod(example, len(self._cycle))
        source = int(self._cycle[slot])
        name, number = self._names[source], cycle * int(self._weights[source]) + int(self._rank[slot])
        kinds = self._kinds[name]
        return Draw(name, number, kinds[number % len(kinds)])

    def records(self, draw: Draw) -> Iterator[int]:
        """The records to try for `draw`: its own, then replacements, all of them different, `MAX_ATTEMPTS` at most."""
        size = self._sizes[draw.source]
        epoch, position = divmod(draw.number, size)
        first = shuffled(position, size, hash32(self.seed, "epoch", draw.source, epoch))
        yield first
        seed = hash32(self.seed, "replacement", draw.source, draw.number)
        for attempt in range(min(size, MAX_ATTEMPTS) - 1):
            other = shuffled(attempt, size - 1, seed)
            yield other + (other >= first)


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


def shuffled(index: int, size: int, seed: int) -> int:
    """Where `index` comes in a permutation of range(size) that `seed` (32 bits) chooses."""
    if size <= _TABLE_SIZE:
        return int(_permutation(size, seed)[index])
    return index_shuffle(index, max_index=size - 1, seed=seed, rounds=_SHUFFLE_ROUNDS)


@functools.lru_cache(maxsize=256)
def _permutation(size: int, seed: int) -> np.ndarray:
    # Raw draws, which numpy keeps the same in every version, and a stable sort, which has one answer.
    return np.argsort(np.random.Philox(key=seed).random_raw(size), kind="stable")


def hash32(*parts: int | str) -> int:
    """32 bits of a hash of `parts`, the same on every machine."""
    return int.from_bytes(_digest(parts, 4), "little")


def example_rng(seed: int, purpose: str, example: int) -> np.random.Generator:
    """The random numbers of one example for one purpose: Philox, counting from the example's number."""
    key = np.array([seed, int.from_bytes(_digest((purpose,), 8), "little")], np.uint64)
    # The generator counts in word 0, so that examples never share a number.
    return np.random.Generator(np.random.Philox(key=key, counter=np.array([0, example, 0, 0], np.uint64)))


def _digest(parts: tuple[int | str, ...], size: int) -> bytes:
    return hashlib.blake2b("\0".join(map(str, parts)).encode(), digest_size=size).digest()
