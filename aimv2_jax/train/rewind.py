"""Going back behind a spike: to which checkpoint, and which batches are jumped over (PaLM, arXiv 2204.02311, 5.1)."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection

from aimv2_jax.data.skips import Skips


class Spike(Exception):
    """The loss or the gradient's norm of a step, and with it what has been computed since, is not to be kept."""

    def __init__(self, step: int, batch: int, told: str):
        super().__init__(told)
        self.step, self.batch = step, batch


@dataclasses.dataclass(frozen=True)
class Rewind:
    """The step whose state is taken again, and the batches [first, end) that no step trains on from now on."""

    step: int
    first: int
    end: int


def plan_rewind(spike: Spike, saved: Collection[int], skips: Skips, batches: int) -> Rewind:
    """Jumps over the batch of the spike and the `batches` - 1 before it.

    The state is that of the newest step that has seen none of them, or where all saved ones have, of the oldest: those
    that it has seen stay seen. The plan follows from what is saved before the spike, so a run that is killed before it
    saves again comes here again, and decides the same.
    """
    first, end = spike.batch + 1 - batches, spike.batch + 1
    before = sorted(step for step in saved if step < spike.step)
    step = next((step for step in reversed(before) if skips.batch(step) <= first), before[0])
    return Rewind(step, max(first, skips.batch(step)), end)
