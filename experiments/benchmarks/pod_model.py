"""Arithmetic of a pod that reads its records from a bucket: request limits, refused reads, prices, and block reads."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import numpy as np

from aimv2_jax.config.schema import BatchShape
from aimv2_jax.data.sampling.counter_rng import hash32, permute_index
from aimv2_jax.data.sampling.mixture import MixtureSampler
from aimv2_jax.data.sampling.schedule import BatchSchedule

# Limits and prices of Google Cloud Storage, as its pages gave them on 2026-11-30:
# https://cloud.google.com/storage/docs/request-rate and https://cloud.google.com/storage/pricing-examples.
INITIAL_READS_PER_S = 5_000
DOUBLING_S = 20 * 60
OBJECTS_PER_PAGE = 1_000
READ_USD = 0.0004 / 1_000  # A class B operation.
LIST_USD = 0.005 / 1_000  # A class A operation: a page of a listing.
STORAGE_USD_PER_GB_MONTH = 0.020  # Standard class, in a region of the US.


@dataclasses.dataclass(frozen=True)
class Ramp:
    """How long a bucket's limit takes to reach a rate of reads, and the time that training at that rate loses by it."""

    seconds: float
    lost_s: float


def ramp(reads_per_s: float) -> Ramp:
    """The ramp of a bucket whose limit doubles every `DOUBLING_S`, under a pod that reads as fast as it is allowed."""
    doublings = max(0, math.ceil(math.log2(reads_per_s / INITIAL_READS_PER_S)))
    done = sum(INITIAL_READS_PER_S * 2**i * DOUBLING_S for i in range(doublings))
    seconds = doublings * DOUBLING_S
    return Ramp(seconds, seconds - done / reads_per_s)


@dataclasses.dataclass(frozen=True)
class Throttled:
    """Reads of a pod whose bucket refuses what exceeds its limit."""

    reads_per_s: float
    attempts_per_read: float
    longest_s: float
    share_over_patience: float


def throttle(
    readers: int,
    limit_per_s: float,
    latency_s: float,
    patience_s: float,
    seconds: float,
    pauses_s: tuple[float, float],
    seed: int = 0,
) -> Throttled:
    """Simulates readers that retry refused reads after pauses that double from the first to the second of `pauses_s`.

    Time passes in slots of the shortest pause; of the attempts in a slot the bucket answers as many as its limit
    allows, at random. `share_over_patience` is the share of reads that were refused for longer than `patience_s`.
    """
    rng = np.random.default_rng(seed)
    slot_s, longest_pause_s = pauses_s
    slots, allowed = round(seconds / slot_s), round(limit_per_s * slot_s)
    busy_slots = max(1, round(latency_s / slot_s))
    due = rng.integers(0, busy_slots, readers)
    refusals = np.zeros(readers, np.int64)
    began = due.copy()
    reads = attempts = over = 0
    longest = 0
    for slot in range(slots):
        ready = np.flatnonzero(due <= slot)
        attempts += len(ready)
        answered = rng.permutation(ready)[:allowed] if len(ready) > allowed else ready
        waited = slot - began[answered]
        reads += len(answered)
        over += int((waited * slot_s > patience_s).sum())
        longest = max(longest, int(waited.max(initial=0)))
        refused = np.setdiff1d(ready, answered, assume_unique=True)
        pause_s = np.minimum(slot_s * 2.0 ** np.minimum(refusals[refused], 30), longest_pause_s)
        due[refused] = slot + np.maximum(1, np.rint(pause_s / slot_s)).astype(np.int64)
        refusals[refused] += 1
        due[answered] = began[answered] = slot + busy_slots
        refusals[answered] = 0
    return Throttled(reads / seconds, attempts / max(reads, 1), longest * slot_s, over / max(reads, 1))


RecordOf = Callable[[int], int]
"""Example number -> record."""


def exact_order(seed: int, records: int) -> RecordOf:
    """The order of training: one permutation of all records an epoch."""
    schedule = BatchSchedule(seed, [BatchShape(1, 1)])
    sampler = MixtureSampler(seed, schedule, {"set": records}, {"set": {"alt": 1}})
    return lambda example: next(sampler.records(sampler.draw(example)))


def block_order(seed: int, records: int, block: int, window: int) -> RecordOf:
    """An order in which `block` neighbouring records are one request.

    The blocks are permuted, and the records of each `window` blocks in a row are shuffled among each other. `records`
    is a multiple of `block`, and the number of blocks one of `window`.
    """
    blocks, size = records // block, block * window
    order = hash32(seed, "blocks")

    def record_of(example: int) -> int:
        number, position = divmod(example, size)
        position = permute_index(position, size, hash32(seed, "window", number))
        return permute_index(number * window + position // block, blocks, order) * block + position % block

    return record_of


def neighbour_pairs(record_of: RecordOf, records: int, batch_size: int, batches: int, seed: int = 0) -> float:
    """Mean number of pairs of neighbouring records in a batch, over batches at random places of the epoch."""
    rng = np.random.default_rng(seed)
    pairs = 0
    for batch in rng.integers(0, records // batch_size, batches):
        first = int(batch) * batch_size
        chosen = np.sort([record_of(example) for example in range(first, first + batch_size)])
        pairs += int((np.diff(chosen) == 1).sum())
    return pairs / batches
