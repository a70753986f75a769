"""What a step thinks of its own numbers, on the devices: whether they are finite, and whether they are a spike.

W values of the window.
"""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool, Float, Int

WINDOW = 128
"""Finite steps whose losses and gradient norms a new one is compared with."""
_LEAST = 32  # So many there must be: of fewer a deviation says little.
_LEAST_DEVIATION = 1e-3  # Of the mean: a loss that stands still is no reason to call the next digit a spike.


class GuardState(struct.PyTreeNode):
    """What the guard remembers, as part of the state; all zeros before the first step.

    Args:
      losses, grad_norms: of the last finite steps, the one at place `seen` modulo W being the oldest.
      seen: finite steps so far.
      nonfinite: steps in a row, the last one included, that were not finite.
    """

    losses: Float[Array, " W"]
    grad_norms: Float[Array, " W"]
    seen: Int[Array, ""]
    nonfinite: Int[Array, ""]


class Verdict(NamedTuple):
    """Of a step: whether its numbers are finite, and by how many deviations they exceed the window (too few yet: 0)."""

    finite: Bool[Array, ""]
    loss_deviations: Float[Array, ""]
    grad_norm_deviations: Float[Array, ""]

    def is_spike(self, sigma: float) -> Bool[Array, ""]:
        """Whether loss or gradient norm lies more than `sigma` deviations above."""
        return self.finite & (jnp.maximum(self.loss_deviations, self.grad_norm_deviations) > sigma)


def fresh() -> GuardState:
    """Before the first step."""
    window, none = jnp.zeros(WINDOW, jnp.float32), jnp.zeros((), jnp.int32)
    return GuardState(losses=window, grad_norms=window, seen=none, nonfinite=none)


def judge(guard: GuardState, loss: Float[Array, ""], grad_norm: Float[Array, ""]) -> tuple[GuardState, Verdict]:
    """The verdict on a step, and the guard after it. Spikes enter the window: a new level is soon the normal one."""
    finite = jnp.isfinite(loss) & jnp.isfinite(grad_norm)
    verdict = Verdict(
        finite,
        jnp.where(finite, _deviations(guard.losses, guard.seen, loss), 0.0),
        jnp.where(finite, _deviations(guard.grad_norms, guard.seen, grad_norm), 0.0),
    )
    place = guard.seen % WINDOW
    after = GuardState(
        losses=jnp.where(finite, guard.losses.at[place].set(loss), guard.losses),
        grad_norms=jnp.where(finite, guard.grad_norms.at[place].set(grad_norm), guard.grad_norms),
        seen=guard.seen + finite,
        nonfinite=jnp.where(finite, 0, guard.nonfinite + 1),
    )
    return after, verdict


def _deviations(window: Float[Array, " W"], seen: Int[Array, ""], value: Float[Array, ""]) -> Float[Array, ""]:
    there = jnp.arange(WINDOW) < seen
    count = jnp.maximum(jnp.minimum(seen, WINDOW), 1)
    mean = jnp.sum(window, where=there) / count
    deviation = jnp.sqrt(jnp.sum(jnp.square(window - mean), where=there) / count)
    least = _LEAST_DEVIATION * jnp.abs(mean)
    return jnp.where(seen >= _LEAST, (value - mean) / jnp.maximum(deviation, jnp.maximum(least, 1e-30)), 0.0)
