"""Batches that a run jumps over: which batch each step trains on.

Without any, step s trains on batch s. A rewind, or `--skip_examples`, takes batches out; those behind them move up.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable

from aimv2_jax.data.steps import Steps
from aimv2_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Skips:
    """`ranges`: batches [first, end) that no step trains on, in rising order, apart from one another."""

    ranges: tuple[tuple[int, int], ...] = ()

    def batch(self, step: int) -> int:
        """The batch of a step."""
        for first, end in self.ranges:
            if step < first:
                break
            step += end - first
        return step

    def adding(self, first: int, end: int) -> Skips:
        """These and the batches [first, end)."""
        merged: list[tuple[int, int]] = []
        for start, stop in sorted([*self.ranges, (first, end)]):
            if merged and start <= merged[-1][1]:
                start, stop = merged[-1][0], max(stop, merged.pop()[1])
            merged.append((start, stop))
        return Skips(tuple(merged))

    def has(self, first: int, end: int) -> bool:
        """Whether all of these batches are among those that are jumped over."""
        return any(start <= first and end <= stop for start, stop in self.ranges)

    def as_json(self) -> list[list[int]]:
        return [list(part) for part in self.ranges]

    @classmethod
    def of_json(cls, ranges: Iterable[Iterable[int]]) -> Skips:
        return cls(tuple((int(first), int(end)) for first, end in ranges))


def batches_of(examples: tuple[int, int], steps: Steps) -> tuple[int, int]:
    """The batches [first, end) that have any of the examples [a, b): whole batches are jumped over."""
    first, last = (_batch_with(example, steps) for example in (examples[0], examples[1] - 1))
    return first, last + 1


def _batch_with(example: int, steps: Steps) -> int:
    low, high = 0, 1
    while steps.first_example(high) <= example:
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if steps.first_example(middle) <= example else (low, middle)
    return low


def with_examples(skips: Skips, examples: tuple[int, int], steps: Steps, done: int) -> Skips:
    """`skips` and the batches of the examples [a, b), in a run that has done `done` steps.

    Raises:
      UserError: where a batch of them was trained on already.
    """
    first, end = batches_of(examples, steps)
    if skips.has(first, end):  # The same command, started again.
        return skips
    next_batch = skips.batch(done)
    if first < next_batch:
        raise UserError(
            f"--skip_examples: some of them were trained on already, in the {done:,} steps that are saved",
            f"{examples[0]}:{examples[1]}",
            f"Give examples from {steps.first_example(next_batch)} on, or move the checkpoints away that saw them",
        )
    return skips.adding(first, end)
