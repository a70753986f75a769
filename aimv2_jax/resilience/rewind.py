"""Rollback after a spike: which checkpoint is restored, and which batches are skipped (PaLM, arXiv 2204.02311, 5.1)."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection

from aimv2_jax.data.sampling.skips import Skips


@dataclasses.dataclass(frozen=True)
class Spike:
    """A step whose loss or gradient norm is a spike; the state since then is discarded.

    Attributes:
      step: number of the step.
      batch: index of its batch.
      message: the value, and how far it is above the mean.
    """

    step: int
    batch: int
    message: str


@dataclasses.dataclass(frozen=True)
class Rewind:
    """The step whose state is restored, and the batches [first, end) that are skipped from now on."""

    step: int
    first: int
    end: int


def plan_rewind(spike: Spike, saved: Collection[int], skips: Skips, batches: int) -> Rewind:
    """Skips the batch of the spike and the `batches` - 1 before it.

    Restores the newest saved step that has trained on none of them. If all have, restores the oldest one and skips only
    the batches that it has not trained on. The result depends only on the steps saved before the spike, so a run killed
    before its next save decides the same again.
    """
    first, end = spike.batch + 1 - batches, spike.batch + 1
    before = sorted(step for step in saved if step < spike.step)
    step = next((step for step in reversed(before) if skips.batch(step) <= first), before[0])
    return Rewind(step, max(first, skips.batch(step)), end)
