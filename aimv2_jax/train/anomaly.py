"""On-device detection of non-finite and spiking steps. W window length."""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool, Float, Int

WINDOW = 128
"""Number of recent finite steps that losses and gradient norms are compared with."""
# With fewer steps in the window, z-scores are not meaningful and reported as 0.
_MIN_STEPS = 32
# Floor of the standard deviation relative to the mean, so that a constant loss does not make tiny changes spikes.
_MIN_RELATIVE_STD = 1e-3


class AnomalyState(struct.PyTreeNode):
    """Window of recent losses and gradient norms, part of the training state; all zeros before the first step.

    Args:
      losses, grad_norms: ring buffers of the last finite steps; index `seen` modulo W is the oldest entry.
      seen: number of finite steps so far.
      nonfinite: number of consecutive non-finite steps up to the last one.
    """

    losses: Float[Array, " W"]
    grad_norms: Float[Array, " W"]
    seen: Int[Array, ""]
    nonfinite: Int[Array, ""]


class AnomalyReport(NamedTuple):
    """Whether a step is finite, and its z-scores against the window (0 until the window has enough steps)."""

    finite: Bool[Array, ""]
    loss_zscore: Float[Array, ""]
    grad_norm_zscore: Float[Array, ""]

    def is_spike(self, sigma: float) -> Bool[Array, ""]:
        """Whether loss or gradient norm is more than `sigma` standard deviations above the window's mean."""
        return self.finite & (jnp.maximum(self.loss_zscore, self.grad_norm_zscore) > sigma)


def initial_state() -> AnomalyState:
    """Returns the state before the first step."""
    window = jnp.zeros(WINDOW, jnp.float32)
    zero = jnp.zeros((), jnp.int32)
    return AnomalyState(losses=window, grad_norms=window, seen=zero, nonfinite=zero)


def detect_anomalies(
    state: AnomalyState, loss: Float[Array, ""], grad_norm: Float[Array, ""]
) -> tuple[AnomalyState, AnomalyReport]:
    """Returns the updated state and the report on a step. Spikes enter the window, so a new level soon is normal."""
    finite = jnp.isfinite(loss) & jnp.isfinite(grad_norm)
    report = AnomalyReport(
        finite,
        jnp.where(finite, _zscore(state.losses, state.seen, loss), 0.0),
        jnp.where(finite, _zscore(state.grad_norms, state.seen, grad_norm), 0.0),
    )
    index = state.seen % WINDOW
    new_state = AnomalyState(
        losses=jnp.where(finite, state.losses.at[index].set(loss), state.losses),
        grad_norms=jnp.where(finite, state.grad_norms.at[index].set(grad_norm), state.grad_norms),
        seen=state.seen + finite,
        nonfinite=jnp.where(finite, 0, state.nonfinite + 1),
    )
    return new_state, report


def _zscore(window: Float[Array, " W"], seen: Int[Array, ""], value: Float[Array, ""]) -> Float[Array, ""]:
    is_filled = jnp.arange(WINDOW) < seen
    count = jnp.maximum(jnp.minimum(seen, WINDOW), 1)
    mean = jnp.sum(window, where=is_filled) / count
    std = jnp.sqrt(jnp.sum(jnp.square(window - mean), where=is_filled) / count)
    min_std = jnp.maximum(_MIN_RELATIVE_STD * jnp.abs(mean), 1e-30)
    return jnp.where(seen >= _MIN_STEPS, (value - mean) / jnp.maximum(std, min_std), 0.0)
