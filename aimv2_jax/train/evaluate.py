"""Held-out losses during training: all losses at fixed prefix lengths, the text loss also at full prefix."""

from __future__ import annotations

import collections
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from aimv2_jax.errors import UserError
from aimv2_jax.train.builder import TrainSetup
from aimv2_jax.train.task import SumCount

Arrays = Mapping[str, np.ndarray]


def fixed_prefixes(fractions: Sequence[float], valid: np.ndarray) -> list[np.ndarray]:
    """Returns for each fraction the prefix lengths [B] of examples with the given valid patches [B, L].

    The length is fraction x n, rounded and clipped to {1 … n-1}; a row without patches gets 1.
    """
    num_valid = valid.sum(axis=1)
    return [np.clip(np.rint(f * num_valid), 1, np.maximum(num_valid - 1, 1)).astype(np.int32) for f in fractions]


def full_prefix(valid: np.ndarray) -> np.ndarray:
    """Returns the prefix lengths [B] that give full attention over the valid patches [B, L]."""
    return valid.sum(axis=1).astype(np.int32)


def evaluate(
    setup: TrainSetup,
    params: Any,
    batches: Iterable[Arrays],
    put: Callable[[Arrays], dict[str, jax.Array]],
    average: Any = None,
) -> dict[str, float]:
    """Computes the losses of `params` over held-out batches.

    Args:
      setup: provides the task and the evaluation settings.
      params: parameters of the task.
      batches: this process' rows of each batch (docs/architecture.md, "Batch").
      put: makes global arrays of such rows.
      average: averaged parameters, whose losses are returned under the same names with the suffix `_ema`.

    Returns:
      `eval_loss`, `eval_loss_<name>` (sums over all prefixes, caption types and examples, divided once) and
      `eval_loss_text_full_prefix`, with full attention over the image. An encoder that was trained with full attention
      uses it for all losses.

    Raises:
      UserError: if a loss has no terms, which must not be reported as a loss of 0.
    """
    task = setup.task
    prefixes = setup.config.eval.prefixes if task.attention_mask == "prefix" else ()
    evaluated = {"": params} | ({} if average is None else {"_ema": average})
    totals = {suffix: (Totals(), Totals()) for suffix in evaluated}
    for arrays in batches:
        batch = put(arrays)
        fixed = [put({"prefix": prefix})["prefix"] for prefix in fixed_prefixes(prefixes, arrays["valid"])]
        full = put({"prefix": full_prefix(arrays["valid"])})["prefix"]
        for suffix, (at_fixed, at_full) in totals.items():
            for prefix in fixed:
                at_fixed.add_terms(setup.eval_sums(evaluated[suffix], batch, prefix))
            if "text" in task.weights:
                at_full.add_terms(setup.eval_sums(evaluated[suffix], batch, full))
    values = {}
    for suffix, (at_fixed, at_full) in totals.items():
        means = _mean_losses(setup, at_fixed if prefixes else at_full, at_full)
        values |= {f"{name}{suffix}": value for name, value in means.items()}
    return values


def _mean_losses(setup: TrainSetup, fixed: Totals, full: Totals) -> dict[str, float]:
    task = setup.task
    losses = {name: fixed.mean(name) for name in task.weights}
    for name, loss in losses.items():
        if loss is None:
            raise UserError(
                f"the held-out datasets of config eval.sources contain nothing to measure the {name} loss on",
                ", ".join(setup.config.eval.sources.values()),
                "Prepare them again, or set eval.sources to other datasets",
            )
    values = {"eval_loss": sum(weight * losses[name] for name, weight in task.weights.items())}
    values |= {f"eval_loss_{name}": loss for name, loss in losses.items()}
    if "text" in task.weights:
        values["eval_loss_text_full_prefix"] = full.mean("text")
    return values


class Totals:
    """Accumulates sums and counts by name, on the host in float64, divided only at the end."""

    def __init__(self):
        self._sums: collections.Counter[str] = collections.Counter()
        self._counts: collections.Counter[str] = collections.Counter()

    def add(self, name: str, total: Any, count: Any) -> None:
        """Adds one sum and its count."""
        self._sums[name] += float(total)
        self._counts[name] += int(count)

    def add_terms(self, terms: Mapping[str, SumCount]) -> None:
        """Adds the result of a task's `loss`."""
        for name, term in terms.items():
            self.add(name, term.sum, term.count)

    def mean(self, name: str) -> float | None:
        """Returns sum over count, or None if the count is 0."""
        return self._sums[name] / self._counts[name] if self._counts[name] else None
