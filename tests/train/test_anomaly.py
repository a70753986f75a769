"""Detection of non-finite and spiking steps."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from aimv2_jax.train import anomaly

detect_anomalies = jax.jit(anomaly.detect_anomalies)


def after(losses, grad_norms=None):
    """Anomaly state after steps with these losses."""
    state = anomaly.initial_state()
    for number, loss in enumerate(losses):
        state, _ = detect_anomalies(
            state, jnp.float32(loss), jnp.float32(1.0 if grad_norms is None else grad_norms[number])
        )
    return state


def test_verdict_when_a_loss_is_far_above_the_window_then_its_deviations_are_those_of_numpy():
    losses = np.random.default_rng(0).normal(3, 0.1, 200).astype(np.float32)
    _, report = detect_anomalies(after(losses), jnp.float32(4.0), jnp.float32(1.0))
    window = losses[-anomaly.WINDOW :].astype(np.float64)
    assert float(report.loss_zscore) == pytest.approx((4 - window.mean()) / window.std(), rel=1e-3)
    assert bool(report.is_spike(6.0)) and not bool(report.is_spike(20.0))


def test_verdict_when_few_steps_were_seen_then_no_spike_yet():
    _, early = detect_anomalies(after([1.0, 1.1] * 15), jnp.float32(100.0), jnp.float32(1.0))
    _, later = detect_anomalies(after([1.0, 1.1] * 16), jnp.float32(100.0), jnp.float32(1.0))
    assert not bool(early.is_spike(6.0)) and bool(later.is_spike(6.0))


def test_verdict_when_the_gradient_alone_jumps_then_a_spike_and_a_fall_is_none():
    norms = [1.0, 1.2] * 20
    state = after([2.0] * 40, norms)
    assert bool(detect_anomalies(state, jnp.float32(2.0), jnp.float32(9.0))[1].is_spike(6.0))
    assert not bool(detect_anomalies(state, jnp.float32(0.1), jnp.float32(0.0))[1].is_spike(6.0))


def test_verdict_when_the_loss_stood_still_then_its_next_digit_is_no_spike():
    _, report = detect_anomalies(after([2.0] * 60), jnp.float32(2.001), jnp.float32(1.0))
    assert not bool(report.is_spike(6.0))


@pytest.mark.parametrize(("loss", "norm"), [(np.nan, 1.0), (np.inf, 1.0), (1.0, np.nan), (1.0, np.inf)])
def test_guard_when_a_step_is_not_finite_then_it_is_counted_and_not_remembered(loss, norm):
    before = after([1.0, 2.0])
    state, report = detect_anomalies(before, jnp.float32(loss), jnp.float32(norm))
    assert not bool(report.finite) and not bool(report.is_spike(0.0)) and int(state.nonfinite) == 1
    assert state.replace(nonfinite=before.nonfinite).losses.tolist() == before.losses.tolist()
    assert int(state.seen) == 2
    assert int(detect_anomalies(state, jnp.float32(np.nan), jnp.float32(1.0))[0].nonfinite) == 2
    assert int(detect_anomalies(state, jnp.float32(1.0), jnp.float32(1.0))[0].nonfinite) == 0
