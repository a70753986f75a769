"""The scaling-law fit: it recovers a law within its intervals, or refuses too few points."""

from __future__ import annotations

import numpy as np
import pytest

from aimv2_jax.errors import UserError
from experiments.scaling.law import NAMES, Law, envelope, fit

LAW = Law(E=1.6, A=60.0, a=0.35, B=40.0, b=0.45)
SIZES, SAMPLES = (3e5, 1.1e6, 2.8e6), (1024, 2048, 4096, 8192)
N, D = (grid.ravel() for grid in np.meshgrid(SIZES, SAMPLES, indexing="ij"))
LOSSES = LAW.loss(N, D)


def noisy(seed: int, spread: float) -> np.ndarray:
    return LOSSES * np.exp(spread * np.random.default_rng(seed).normal(size=len(LOSSES)))


def inside(interval, value: float) -> bool:
    low, high = interval
    return (low is None or low <= value) and (high is None or value <= high)


def test_law_when_asked_for_a_loss_then_its_formula():
    assert Law(1.0, 6.0, 0.5, 8.0, 1.0).loss(9, 4) == pytest.approx(1 + 6 / 3 + 8 / 4)


def test_fit_when_points_lie_on_a_law_then_finds_it():
    fitted = fit(N, D, LOSSES)
    for name in NAMES:
        assert getattr(fitted.law, name) == pytest.approx(getattr(LAW, name), rel=1e-6)
        low, high = fitted.intervals[name]
        assert low < high and inside((low, high), getattr(LAW, name))
    np.testing.assert_allclose(fitted.residuals, 0, atol=1e-9)
    np.testing.assert_array_equal(fitted.weights, 1)


@pytest.mark.parametrize("seed", [1, 2, 4])
def test_fit_when_points_are_noisy_then_the_law_is_within_its_intervals(seed):
    fitted = fit(N, D, noisy(seed, 0.003))
    for name in NAMES:
        assert inside(fitted.intervals[name], getattr(fitted.law, name))
        assert inside(fitted.intervals[name], getattr(LAW, name)), name
    low, high = fitted.intervals["b"]
    assert 0.3 < low < high < 0.6  # Wide but informative.
    np.testing.assert_allclose(noisy(seed, 0.003) / fitted.law.loss(N, D), np.exp(fitted.residuals))


def test_fit_when_one_run_went_wrong_then_it_hardly_counts():
    losses = noisy(3, 0.002)
    losses[5] *= 1.2
    fitted = fit(N, D, losses)
    assert np.argmin(fitted.weights) == 5 and fitted.weights[5] < 0.1
    assert fitted.residuals[5] == pytest.approx(np.log(1.2), abs=0.03)
    assert fitted.law.b == pytest.approx(LAW.b, abs=0.05)  # Plain least squares gives 0.60.
    assert all(inside(fitted.intervals[name], getattr(LAW, name)) for name in NAMES)


def test_fit_when_size_makes_no_difference_then_its_exponent_is_not_bounded():
    losses = Law(1.6, 1e-9, 0.3, 40.0, 0.45).loss(N, D) * np.exp(0.002 * np.random.default_rng(0).normal(size=12))
    low, high = fit(N, D, losses).intervals["a"]
    assert low == 0.0 and high is None


@pytest.mark.parametrize(
    ("kept", "words"),
    [(slice(0, 4), "too few points .* 6: 4"), (slice(0, 8), "too few sizes .* 3: 2"), (N > 0, "sample counts .* 3: 2")],
)
def test_fit_when_there_are_too_few_points_then_one_sentence(kept, words):
    d = np.where(D > 2048, 4096, 1024) if "sample counts" in words else D
    with pytest.raises(UserError, match=words):
        fit(N[kept], d[kept], LOSSES[kept])


def test_envelope_when_compared_with_every_size_then_never_above_and_touches_the_best():
    costs = [(n, 2000 * n) for n in SIZES]
    flops = np.geomspace(1e12, 4e13, 20)
    lowest = envelope(LAW, costs, flops)
    own = np.stack([LAW.loss(n, flops / cost) for n, cost in costs])
    assert (lowest <= own.min(axis=0)).all()
    # Inside the study's sizes, the best size has a closed form: N = (aA / bB · (C/2000)^b)^(1/(a+b)).
    best = (LAW.a * LAW.A / (LAW.b * LAW.B) * (flops / 2000) ** LAW.b) ** (1 / (LAW.a + LAW.b))
    between = (best > SIZES[0]) & (best < SIZES[-1])
    assert between.sum() > 5
    np.testing.assert_allclose(lowest[between], LAW.loss(best, flops / 2000 / best)[between], rtol=1e-5)
