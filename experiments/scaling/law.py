"""Saturating power law in parameters and samples, fitted to a few points: L(N, D) = E + A / N^a + B / D^b.

Residuals are in log L, so that relative errors count equally everywhere. Huber weights (1.345 standard deviations,
their scale from the median) limit the effect of outlier runs.

Intervals are profiles: a value of a parameter is inside as long as the other four can be refitted so that the sum of
w r² over residuals r with weights w grows by no more than F s²; F is the 95 % quantile of F(1, n - 5), and
s² = Σ (w r)² / (n - 5). A bootstrap is no alternative: resampling a dozen points on a 3 x 4 grid often omits a size,
and then no law can be fitted. The parameters also trade off along curved valleys, which profiles follow, and profiles
show when an end is unbounded.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float
from scipy.optimize import least_squares
from scipy.stats import f as f_distribution

from aimv2_jax.errors import UserError

LEVEL = 0.95
NAMES = ("E", "A", "a", "B", "b")

_HUBER = 1.345  # Standard deviations: 95 % as efficient as least squares where errors are normal.
_MAX_EXPONENT = 10.0  # Larger exponents describe steps, not powers.
_MIN_SPREAD = 1e-6  # Rounding error of log L.
_BOUND_MARGIN = 1e-9  # Distance of a start point from its bounds.
_LOG_A, _LOG_B = 1, 3  # Indices of log A and log B among the variables.

Interval = tuple[float | None, float | None]
"""Lower and upper end; None: the points do not bound it."""


@dataclasses.dataclass(frozen=True)
class Law:
    """L(N, D) = E + A / N^a + B / D^b."""

    E: float
    A: float
    a: float
    B: float
    b: float

    def loss(self, parameters: float | np.ndarray, samples: float | np.ndarray) -> np.ndarray:
        """Returns the loss of models with N `parameters` after D `samples`; arrays are broadcast."""
        logs = np.log(self.A) - self.a * np.log(parameters), np.log(self.B) - self.b * np.log(samples)
        return self.E + np.exp(logs[0]) + np.exp(logs[1])


@dataclasses.dataclass(frozen=True)
class Fit:
    """A law, the interval of each parameter by name, and each point's log(loss / law) and weight in (0, 1]."""

    law: Law
    intervals: dict[str, Interval]
    residuals: Float[np.ndarray, " n"]
    weights: Float[np.ndarray, " n"]


def fit(parameters: Sequence[float], samples: Sequence[float], losses: Sequence[float]) -> Fit:
    """Fits the law to n points.

    Raises:
      UserError: for fewer than 6 points, 3 sizes or 3 sample counts, which cannot determine five parameters.
    """
    n, d, loss = (np.asarray(values, float) for values in (parameters, samples, losses))
    for minimum, count, what in (
        (6, len(loss), "points"),
        (3, len(set(n)), "sizes"),
        (3, len(set(d)), "sample counts"),
    ):
        if count < minimum:
            remedy = "Train more of the study: experiments/scaling/grid.py --start"
            raise UserError(f"too few {what} for a law of five parameters, which needs {minimum}", count, remedy)
    if not (np.isfinite(loss) & (loss > 0)).all():
        raise UserError("losses must be above zero", loss[~(loss > 0)].tolist(), "Leave these points out")
    problem = _Problem(np.log(n), np.log(d), np.log(loss), np.ones(len(loss)))
    centre = problem.log_n.mean(), problem.log_d.mean()
    centred = dataclasses.replace(problem, log_n=problem.log_n - centre[0], log_d=problem.log_d - centre[1])
    best = min((centred.solve(guess) for guess in centred.guesses()), key=centred.squares)
    for _ in range(50):  # Each iteration lowers Huber's objective until the weights converge.
        weights = _huber_weights(centred.residuals(best))
        change = np.abs(weights - centred.weights).max()
        centred = dataclasses.replace(centred, weights=weights)
        best = centred.solve(best)
        if change < 1e-4:
            break
    floor, log_first, a, log_second, b = best
    raw = np.array([floor, log_first + a * centre[0], a, log_second + b * centre[1], b])
    # The profile of A uses the original N and that of B the original D; the others use the well-posed centred problem.
    in_a = dataclasses.replace(centred, log_n=problem.log_n), np.where(np.arange(5) == _LOG_A, raw, best)
    in_b = dataclasses.replace(centred, log_d=problem.log_d), np.where(np.arange(5) == _LOG_B, raw, best)
    intervals = {}
    for index, name in enumerate(NAMES):
        profiled, optimum = in_a if index == _LOG_A else in_b if index == _LOG_B else (centred, best)
        intervals[name] = profiled.interval(optimum, index)
    law = Law(*map(float, (floor, np.exp(raw[_LOG_A]), a, np.exp(raw[_LOG_B]), b)))
    return Fit(law, intervals, -centred.residuals(best), centred.weights)


@dataclasses.dataclass(frozen=True)
class _Problem:
    """Least-squares problem of the points in the variables v = (E, log A, a, log B, b)."""

    log_n: Float[np.ndarray, " n"]
    log_d: Float[np.ndarray, " n"]
    log_loss: Float[np.ndarray, " n"]
    weights: Float[np.ndarray, " n"]

    @property
    def bounds(self) -> tuple[np.ndarray, np.ndarray]:
        lowest = np.exp(self.log_loss.min())
        upper = np.array([lowest, np.inf, _MAX_EXPONENT, np.inf, _MAX_EXPONENT])
        return np.array([0.0, -np.inf, 0.0, -np.inf, 0.0]), upper

    def guesses(self) -> list[np.ndarray]:
        """Returns start points: fractions of the floor and exponents, with equal terms at the centre."""
        lowest, middle = np.exp(self.log_loss.min()), np.exp(self.log_loss.mean())
        shares, exponents = (0.05, 0.5, 0.9), (0.1, 0.4, 1.2)
        return [
            np.array(
                [share * lowest, np.log((middle - share * lowest) / 2), a, np.log((middle - share * lowest) / 2), b]
            )
            for share, a, b in itertools.product(shares, exponents, exponents)
        ]

    def terms(self, v: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        first = np.exp(np.minimum(v[1] - v[2] * self.log_n, 50))
        return first, np.exp(np.minimum(v[3] - v[4] * self.log_d, 50))

    def residuals(self, v: np.ndarray) -> np.ndarray:
        """Returns the log of the law minus the log of the loss."""
        return np.log(np.maximum(v[0] + sum(self.terms(v)), 1e-30)) - self.log_loss

    def squares(self, v: np.ndarray) -> float:
        return float(self.weights @ self.residuals(v) ** 2)

    def solve(self, start: np.ndarray, fixed: int | None = None) -> np.ndarray:
        """Solves the least-squares problem from `start`; the variable with index `fixed` stays constant."""
        free = [index for index in range(5) if index != fixed]
        low, high = (bound[free] for bound in self.bounds)
        root = np.sqrt(self.weights)

        def full(values: np.ndarray) -> np.ndarray:
            v = start.copy()
            v[free] = values
            return v

        def jacobian(values: np.ndarray) -> np.ndarray:
            v = full(values)
            first, second = self.terms(v)
            columns = np.stack([np.ones_like(first), first, -first * self.log_n, second, -second * self.log_d], 1)
            return (root / np.maximum(v[0] + first + second, 1e-30))[:, None] * columns[:, free]

        result = least_squares(
            lambda values: root * self.residuals(full(values)),
            np.clip(start[free], low + _BOUND_MARGIN, high - _BOUND_MARGIN),
            jacobian,
            (low, high),
            x_scale="jac",
            max_nfev=300,
            **dict.fromkeys(("xtol", "ftol", "gtol"), 1e-12),
        )
        return full(result.x)

    def interval(self, best: np.ndarray, index: int) -> Interval:
        """Returns the profile interval at LEVEL of the variable with this index; A and B instead of their logs."""
        freedom = len(self.log_loss) - len(NAMES)
        variance = max(((self.weights * self.residuals(best)) ** 2).sum() / freedom, _MIN_SPREAD**2)
        limit = self.squares(best) + f_distribution.ppf(LEVEL, 1, freedom) * variance
        low, high = self._end(best, index, -1, limit), self._end(best, index, 1, limit)
        if index in (_LOG_A, _LOG_B):
            return tuple(None if end is None or not abs(end) < 700 else float(np.exp(end)) for end in (low, high))
        return 0.0 if low is None else low, high

    def _end(self, best: np.ndarray, index: int, sign: int, limit: float) -> float | None:
        """Brackets the end with growing steps from the best value, then bisects; None: no end within bounds."""
        bound = float(self.bounds[0 if sign < 0 else 1][index])
        step = 0.05 * max(abs(best[index]), 1e-3)
        inside, outside = best, None
        while outside is None:
            value = inside[index] + sign * step
            if abs(value - best[index]) > 1e4 * max(1, abs(best[index])):
                return None
            if sign * (value - bound) >= 0:
                value = bound
            moved = self._refit(inside, index, value)
            if self.squares(moved) > limit:
                outside = value
            elif value == bound:
                return None
            else:
                inside, step = moved, 2 * step
        for _ in range(12):
            moved = self._refit(inside, index, (inside[index] + outside) / 2)
            if self.squares(moved) > limit:
                outside = moved[index]
            else:
                inside = moved
        return float(inside[index])

    def _refit(self, near: np.ndarray, index: int, value: float) -> np.ndarray:
        start = near.copy()
        start[index] = value
        return self.solve(start, fixed=index)


def _huber_weights(residuals: np.ndarray) -> np.ndarray:
    spread = np.sqrt(len(residuals) / (len(residuals) - len(NAMES))) * 1.4826 * np.median(np.abs(residuals))
    return np.minimum(1, _HUBER * max(spread, _MIN_SPREAD) / np.maximum(np.abs(residuals), 1e-300))


def envelope(
    law: Law,
    sizes: Sequence[tuple[float, float]],
    flops: Float[np.ndarray, " c"],
) -> Float[np.ndarray, " c"]:
    """Returns the law's lowest loss at each compute, over sizes between the smallest and the largest.

    Args:
      sizes: (parameters, FLOPs a sample) of each size; FLOPs are interpolated linearly in parameters.
    """
    known = np.array(sorted(sizes))
    n = np.unique(np.concatenate([np.geomspace(known[0, 0], known[-1, 0], 400), known[:, 0]]))
    return law.loss(n[None, :], flops[:, None] / np.interp(n, known[:, 0], known[:, 1])[None, :]).min(axis=1)
