"""A saturating power law in parameters and samples, fitted to a few points: L(N, D) = E + A / N^a + B / D^b.

Residuals are of log L, so that a percent counts alike everywhere. Huber's weights (1.345 standard deviations, their
scale from the median) keep a run that went wrong from bending the law.

Intervals are profiles: a value of a parameter is inside as long as the other four can be refitted so that the sum of
w r² over residuals r with weights w grows by no more than F s²; F is the 95 % quantile of F(1, n - 5), and
s² = Σ (w r)² / (n - 5). Chosen over a bootstrap: resampling a dozen points on a 3 x 4 grid often leaves a size out, and
then there is no law to fit; and these parameters trade against each other along curved valleys, which profiles follow,
and where they don't end they say so.
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
_STEEPEST = 10.0  # Exponents beyond are steps, not powers.
_NEGLIGIBLE = 1e-6  # Of log L: what rounding leaves.
_INSIDE = 1e-9  # Of its bounds a search must begin so far.
_FIRST, _SECOND = 1, 3  # Places of log A and log B among the variables.

Interval = tuple[float | None, float | None]
"""Lower and upper end; None: the points do not bound it there."""


@dataclasses.dataclass(frozen=True)
class Law:
    """L(N, D) = E + A / N^a + B / D^b."""

    E: float
    A: float
    a: float
    B: float
    b: float

    def loss(self, parameters: float | np.ndarray, samples: float | np.ndarray) -> np.ndarray:
        """The loss of models of N `parameters` after D `samples`; arrays are broadcast."""
        logs = np.log(self.A) - self.a * np.log(parameters), np.log(self.B) - self.b * np.log(samples)
        return self.E + np.exp(logs[0]) + np.exp(logs[1])


@dataclasses.dataclass(frozen=True)
class Fit:
    """A law, the interval of each of its parameters by name, and of each point log(loss / law) and weight in (0, 1]."""

    law: Law
    intervals: dict[str, Interval]
    residuals: Float[np.ndarray, " n"]
    weights: Float[np.ndarray, " n"]


def fit(parameters: Sequence[float], samples: Sequence[float], losses: Sequence[float]) -> Fit:
    """Fits the law to n points.

    Raises:
      UserError: for fewer than 6 points, 3 sizes or 3 sample counts, which five parameters cannot be had from.
    """
    n, d, loss = (np.asarray(values, float) for values in (parameters, samples, losses))
    for least, count, what in ((6, len(loss), "points"), (3, len(set(n)), "sizes"), (3, len(set(d)), "sample counts")):
        if count < least:
            remedy = "Train more of the study: experiments/scaling/grid.py --start"
            raise UserError(f"too few {what} for a law of five parameters, which needs {least}", count, remedy)
    if not (np.isfinite(loss) & (loss > 0)).all():
        raise UserError("losses must be above zero", loss[~(loss > 0)].tolist(), "Leave such points out")
    problem = _Problem(np.log(n), np.log(d), np.log(loss), np.ones(len(loss)))
    centre = problem.log_n.mean(), problem.log_d.mean()
    centred = dataclasses.replace(problem, log_n=problem.log_n - centre[0], log_d=problem.log_d - centre[1])
    best = min((centred.solve(guess) for guess in centred.guesses()), key=centred.squares)
    for _ in range(50):  # Each lowers Huber's objective; in the end nothing moves.
        weights = _huber_weights(centred.residuals(best))
        moved = np.abs(weights - centred.weights).max()
        centred = dataclasses.replace(centred, weights=weights)
        best = centred.solve(best)
        if moved < 1e-4:
            break
    floor, log_first, a, log_second, b = best
    raw = np.array([floor, log_first + a * centre[0], a, log_second + b * centre[1], b])
    # The profile of A is taken where N is as it is, that of all others where N and D are centred, and so well posed.
    in_a = dataclasses.replace(centred, log_n=problem.log_n), np.where(np.arange(5) == _FIRST, raw, best)
    in_b = dataclasses.replace(centred, log_d=problem.log_d), np.where(np.arange(5) == _SECOND, raw, best)
    intervals = {}
    for place, name in enumerate(NAMES):
        of, at = in_a if place == _FIRST else in_b if place == _SECOND else (centred, best)
        intervals[name] = of.interval(at, place)
    law = Law(*map(float, (floor, np.exp(raw[_FIRST]), a, np.exp(raw[_SECOND]), b)))
    return Fit(law, intervals, -centred.residuals(best), centred.weights)


@dataclasses.dataclass(frozen=True)
class _Problem:
    """The points, and what can be asked about variables v = (E, log A, a, log B, b) at them."""

    log_n: Float[np.ndarray, " n"]
    log_d: Float[np.ndarray, " n"]
    log_loss: Float[np.ndarray, " n"]
    weights: Float[np.ndarray, " n"]

    @property
    def bounds(self) -> tuple[np.ndarray, np.ndarray]:
        lowest = np.exp(self.log_loss.min())
        return np.array([0.0, -np.inf, 0.0, -np.inf, 0.0]), np.array([lowest, np.inf, _STEEPEST, np.inf, _STEEPEST])

    def guesses(self) -> list[np.ndarray]:
        """Where a search may begin: shares of floor and exponents, the terms alike at the centre."""
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
        """log of the law minus log of the loss."""
        return np.log(np.maximum(v[0] + sum(self.terms(v)), 1e-30)) - self.log_loss

    def squares(self, v: np.ndarray) -> float:
        return float(self.weights @ self.residuals(v) ** 2)

    def solve(self, start: np.ndarray, fixed: int | None = None) -> np.ndarray:
        """The variables of least squares found from `start`; that at place `fixed` stays."""
        free = [place for place in range(5) if place != fixed]
        low, high = (bound[free] for bound in self.bounds)
        root = np.sqrt(self.weights)

        def whole(values: np.ndarray) -> np.ndarray:
            v = start.copy()
            v[free] = values
            return v

        def jacobian(values: np.ndarray) -> np.ndarray:
            v = whole(values)
            first, second = self.terms(v)
            columns = np.stack([np.ones_like(first), first, -first * self.log_n, second, -second * self.log_d], 1)
            return (root / np.maximum(v[0] + first + second, 1e-30))[:, None] * columns[:, free]

        found = least_squares(
            lambda values: root * self.residuals(whole(values)),
            np.clip(start[free], low + _INSIDE, high - _INSIDE),
            jacobian,
            (low, high),
            x_scale="jac",
            max_nfev=300,
            **dict.fromkeys(("xtol", "ftol", "gtol"), 1e-12),
        )
        return whole(found.x)

    def interval(self, best: np.ndarray, place: int) -> Interval:
        """Where the profile of the variable at `place` leaves what LEVEL allows; factors as themselves, not logs."""
        spare = len(self.log_loss) - len(NAMES)
        variance = max(((self.weights * self.residuals(best)) ** 2).sum() / spare, _NEGLIGIBLE**2)
        most = self.squares(best) + f_distribution.ppf(LEVEL, 1, spare) * variance
        low, high = self._end(best, place, -1, most), self._end(best, place, 1, most)
        if place in (_FIRST, _SECOND):
            return tuple(None if end is None or not abs(end) < 700 else float(np.exp(end)) for end in (low, high))
        return 0.0 if low is None else low, high

    def _end(self, best: np.ndarray, place: int, sign: int, most: float) -> float | None:
        """Steps away from the best value, further each time, then halves the last step; None: no end within bounds."""
        bound = float(self.bounds[0 if sign < 0 else 1][place])
        step = 0.05 * max(abs(best[place]), 1e-3)
        inside, outside = best, None
        while outside is None:
            value = inside[place] + sign * step
            if abs(value - best[place]) > 1e4 * max(1, abs(best[place])):
                return None
            if sign * (value - bound) >= 0:
                value = bound
            moved = self._moved(inside, place, value)
            if self.squares(moved) > most:
                outside = value
            elif value == bound:
                return None
            else:
                inside, step = moved, 2 * step
        for _ in range(12):
            moved = self._moved(inside, place, (inside[place] + outside) / 2)
            if self.squares(moved) > most:
                outside = moved[place]
            else:
                inside = moved
        return float(inside[place])

    def _moved(self, near: np.ndarray, place: int, value: float) -> np.ndarray:
        start = near.copy()
        start[place] = value
        return self.solve(start, fixed=place)


def _huber_weights(residuals: np.ndarray) -> np.ndarray:
    spread = np.sqrt(len(residuals) / (len(residuals) - len(NAMES))) * 1.4826 * np.median(np.abs(residuals))
    return np.minimum(1, _HUBER * max(spread, _NEGLIGIBLE) / np.maximum(np.abs(residuals), 1e-300))


def envelope(
    law: Law,
    sizes: Sequence[tuple[float, float]],
    flops: Float[np.ndarray, " c"],
) -> Float[np.ndarray, " c"]:
    """The lowest loss the law allows at each compute, by the best size between the smallest and the largest.

    Args:
      sizes: of each, its parameters and its FLOPs a sample; between them FLOPs follow parameters as straight lines.
    """
    known = np.array(sorted(sizes))
    n = np.unique(np.concatenate([np.geomspace(known[0, 0], known[-1, 0], 400), known[:, 0]]))
    return law.loss(n[None, :], flops[:, None] / np.interp(n, known[:, 0], known[:, 1])[None, :]).min(axis=1)
