"""Skipped batches: the map from step to batch.

Without skips, step s trains on batch s. A rewind, or `--skip_examples`, removes batches; later ones move up.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable

from aimv2_jax.data.sampling.schedule import BatchSchedule
from aimv2_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Skips:
    """`ranges`: batches [first, end) that no step trains on, rising and disjoint."""

    ranges: tuple[tuple[int, int], ...] = ()

    def batch(self, step: int) -> int:
        """The batch that `step` trains on."""
        for first, end in self.ranges:
            if step < first:
                break
            step += end - first
        return step

    def adding(self, first: int, end: int) -> Skips:
        """These skips and the batches [first, end)."""
        merged: list[tuple[int, int]] = []
        for start, stop in sorted([*self.ranges, (first, end)]):
            if merged and start <= merged[-1][1]:
                start, stop = merged[-1][0], max(stop, merged.pop()[1])
            merged.append((start, stop))
        return Skips(tuple(merged))

    def contains(self, first: int, end: int) -> bool:
        """Whether all batches [first, end) are skipped."""
        return any(start <= first and end <= stop for start, stop in self.ranges)

    def as_json(self) -> list[list[int]]:
        return [list(skipped) for skipped in self.ranges]

    @classmethod
    def from_json(cls, ranges: Iterable[Iterable[int]]) -> Skips:
        return cls(tuple((int(first), int(end)) for first, end in ranges))


def batches_of(examples: tuple[int, int], schedule: BatchSchedule) -> tuple[int, int]:
    """The batches [first, end) that have any of the examples [a, b): whole batches are skipped."""
    first, last = (_batch_with(example, schedule) for example in (examples[0], examples[1] - 1))
    return first, last + 1


def _batch_with(example: int, schedule: BatchSchedule) -> int:
    low, high = 0, 1
    while schedule.first_example(high) <= example:
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if schedule.first_example(middle) <= example else (low, middle)
    return low


def with_examples(skips: Skips, examples: tuple[int, int], schedule: BatchSchedule, done: int) -> Skips:
    """Adds the batches of the examples [a, b) to `skips`, in a run that has completed `done` steps.

    Raises:
      UserError: if the run already trained on one of these batches.
    """
    first, end = batches_of(examples, schedule)
    if skips.contains(first, end):  # The same command was restarted.
        return skips
    next_batch = skips.batch(done)
    if first < next_batch:
        raise UserError(
            f"--skip_examples: some examples were trained on already, in the {done:,} saved steps",
            f"{examples[0]}:{examples[1]}",
            f"Give examples from {schedule.first_example(next_batch)} on, or move away the checkpoints that saw them",
        )
    return skips.adding(first, end)
