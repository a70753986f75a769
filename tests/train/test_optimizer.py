"""Optimiser properties beyond the golden steps: schedule, clipping, decay, average."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import optax
import pytest

from aimv2_jax.train.optimizer import adamlh, clip_by_global_norm, ema_step, learning_rate


def rate(**changes):
    return learning_rate(
        **dict(start_lr=1e-6, peak_lr=1e-3, end_lr=1e-5, warmup_steps=10, schedule_steps=110) | changes
    )


def test_learning_rate_when_at_its_ends_then_start_peak_end_and_end_from_there_on():
    schedule = rate()
    values = [float(schedule(jnp.asarray(step))) for step in (0, 10, 60, 110, 10**6)]
    assert values == pytest.approx([1e-6, 1e-3, (1e-3 + 1e-5) / 2, 1e-5, 1e-5], rel=1e-6)


def test_learning_rate_when_there_is_no_warm_up_then_starts_at_the_peak():
    assert float(rate(warmup_steps=0)(jnp.asarray(0))) == pytest.approx(1e-3)


@pytest.mark.parametrize(("size", "factor"), [(0.5, 1.0), (1.0, 1 / (1 + 1e-6)), (4.0, 1 / (4 + 1e-6))])
def test_clip_when_any_norm_then_scaled_by_the_reference_factor(size, factor):
    tree = {"a": jnp.asarray([0.6 * size]), "b": jnp.asarray([[0.8 * size]])}
    clipped, _ = clip_by_global_norm(1.0, 1e-6).update(tree, optax.EmptyState())
    np.testing.assert_allclose(clipped["a"], 0.6 * size * factor, rtol=1e-6)
    np.testing.assert_allclose(clipped["b"], 0.8 * size * factor, rtol=1e-6)


def test_decay_when_gradients_are_zero_then_a_share_that_follows_the_schedule_and_spares_gains():
    schedule = rate()
    optimizer = adamlh(schedule, peak_lr=1e-3, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1, clip_norm=1.0)
    params = {"mlp": {"kernel": jnp.ones(3)}, "norm": {"scale": jnp.ones(3)}}
    zeros = {"mlp": {"kernel": jnp.zeros(3)}, "norm": {"scale": jnp.zeros(3)}}
    state, expected = optimizer.init(params), 1.0
    for step in range(12):
        updates, state = optimizer.update(zeros, state, params)
        params = optax.apply_updates(params, updates)
        expected *= 1 - 0.1 * float(schedule(jnp.asarray(step))) / 1e-3
    np.testing.assert_allclose(params["mlp"]["kernel"], expected, rtol=1e-5)
    np.testing.assert_array_equal(params["norm"]["scale"], 1.0)


def test_average_when_taken_step_by_step_then_the_weighted_mean_of_all_steps_and_nothing_of_before():
    steps = np.random.default_rng(0).normal(size=(50, 3)).astype(np.float32)
    for decay in (0.5, 0.9999):
        average = {"a": jnp.zeros(3)}
        for number, params in enumerate(steps, start=1):
            average = ema_step(average, {"a": jnp.asarray(params)}, jnp.int32(number), decay)
            weights = decay ** np.arange(number - 1, -1, -1.0)
            expected = weights @ steps[:number] / weights.sum()
            np.testing.assert_allclose(
                average["a"], expected, rtol=0, atol=2e-6
            )  # Fifty roundings of 6e-8 each, of values near 1.


def test_learning_rate_when_half_the_cosine_then_ends_half_the_way_down_and_stays():
    schedule = rate(cosine_part=0.5)
    middle = 1e-5 + (1e-3 - 1e-5) * np.cos(np.pi / 8) ** 2  # A quarter of the full cosine, where it is 0.854.
    values = [float(schedule(jnp.asarray(step))) for step in (0, 5, 10, 60, 110, 10**6)]
    assert values == pytest.approx([1e-6, (1e-3 + 1e-6) / 2, 1e-3, middle, 5.05e-4, 5.05e-4], rel=1e-6)


def test_learning_rate_when_half_the_cosine_then_the_whole_one_of_twice_the_steps():
    half, whole = rate(cosine_part=0.5), rate(schedule_steps=210)
    for step in (0, 9, 10, 37, 110):
        assert float(half(jnp.asarray(step))) == pytest.approx(float(whole(jnp.asarray(step))), rel=1e-6)


def test_learning_rate_when_it_cools_down_then_continuous_linear_and_at_its_end_exact():
    base = rate(cosine_part=0.5)
    schedule = rate(cosine_part=0.5, cooldown_start=60, cooldown_steps=12, cooldown_lr=1e-6)
    for step in (0, 5, 10, 35, 59, 60):
        assert float(schedule(jnp.asarray(step))) == pytest.approx(float(base(jnp.asarray(step))), rel=1e-6)
    top = 1e-5 + (1e-3 - 1e-5) * np.cos(np.pi / 8) ** 2
    values = [float(schedule(jnp.asarray(step))) for step in (63, 66, 71, 72, 10**6)]
    expected = [1e-6 + (top - 1e-6) * left for left in (3 / 4, 1 / 2, 1 / 12, 0, 0)]
    assert values == pytest.approx(expected, rel=1e-6)


def test_cooldown_when_updates_were_skipped():
    """The cooldown starts at the curve's current rate, and reaches its end at the same step despite skips."""
    base, skipped = rate(cosine_part=0.5), 7
    schedule = rate(cosine_part=0.5, cooldown_start=60, cooldown_steps=12, cooldown_lr=1e-6)
    top = float(base(jnp.asarray(60 - skipped)))
    for step, left in ((60, 1), (66, 1 / 2), (71, 1 / 12), (72, 0)):
        value = float(schedule(jnp.asarray(step - skipped), jnp.asarray(step)))
        assert value == pytest.approx(1e-6 + (top - 1e-6) * left, rel=1e-6)
