"""Held-out losses during training: both at fixed prefix lengths, the text's at full prefix too."""

from __future__ import annotations

import collections
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from aimv2_jax.errors import UserError
from aimv2_jax.train.program import Program
from aimv2_jax.train.task import SumCount

Arrays = Mapping[str, np.ndarray]


def fixed_prefixes(fractions: Sequence[float], valid: np.ndarray) -> list[np.ndarray]:
    """For each share, the prefix lengths [B] of examples with the given valid patches [B, L].

    K is the nearest whole number to share x n, kept to {1 … n-1}; a row without patches gets 1.
    """
    num_valid = valid.sum(axis=1)
    return [np.clip(np.rint(f * num_valid), 1, np.maximum(num_valid - 1, 1)).astype(np.int32) for f in fractions]


def full_prefix(valid: np.ndarray) -> np.ndarray:
    """Prefix lengths [B] with which the encoder reads every valid patch [B, L] freely."""
    return valid.sum(axis=1).astype(np.int32)


def evaluate(
    program: Program,
    params: Any,
    batches: Iterable[Arrays],
    put: Callable[[Arrays], dict[str, jax.Array]],
    average: Any = None,
) -> dict[str, float]:
    """Losses of `params` over held-out batches.

    Args:
      program: whose task and settings of evaluation they are.
      params: of the task.
      batches: this process' rows of each batch (LAYOUT.md, "Batch").
      put: makes the global arrays of such rows.
      average: other parameters, whose figures are given beside, under the same names with `_ema`.

    Returns:
      `eval_loss`, `eval_loss_<name>` (sums over all prefixes, kinds and examples, divided once) and
      `eval_loss_text_full_prefix`, where the encoder reads the whole picture freely. An encoder that was trained to do
      so does so for all of them.

    Raises:
      UserError: where nothing was counted, which is no loss of 0.
    """
    task = program.task
    prefixes = program.config.eval.prefixes if task.attention_mask == "prefix" else ()
    evaluated = {"": params} | ({} if average is None else {"_ema": average})
    totals = {ending: (Totals(), Totals()) for ending in evaluated}
    for arrays in batches:
        batch = put(arrays)
        fixed = [put({"prefix": prefix})["prefix"] for prefix in fixed_prefixes(prefixes, arrays["valid"])]
        full = put({"prefix": full_prefix(arrays["valid"])})["prefix"]
        for ending, (at_fixed, at_full) in totals.items():
            for prefix in fixed:
                at_fixed.add_terms(program.eval_sums(evaluated[ending], batch, prefix))
            if "text" in task.weights:
                at_full.add_terms(program.eval_sums(evaluated[ending], batch, full))
    values = {}
    for ending, (at_fixed, at_full) in totals.items():
        figures = _figures(program, at_fixed if prefixes else at_full, at_full)
        values |= {f"{name}{ending}": value for name, value in figures.items()}
    return values


def _figures(program: Program, fixed: Totals, full: Totals) -> dict[str, float]:
    task = program.task
    losses = {name: fixed.mean(name) for name in task.weights}
    for name, loss in losses.items():
        if loss is None:
            raise UserError(
                f"the held-out sets of config eval.sources have nothing to measure the {name} loss on",
                ", ".join(program.config.eval.sources.values()),
                "Prepare them again, or set eval.sources to others",
            )
    values = {"eval_loss": sum(weight * losses[name] for name, weight in task.weights.items())}
    values |= {f"eval_loss_{name}": loss for name, loss in losses.items()}
    if "text" in task.weights:
        values["eval_loss_text_full_prefix"] = full.mean("text")
    return values


class Totals:
    """Sums and counts by name, on the host in float64, kept apart until the end."""

    def __init__(self):
        self._sums: collections.Counter[str] = collections.Counter()
        self._counts: collections.Counter[str] = collections.Counter()

    def add(self, name: str, total: Any, count: Any) -> None:
        """Adds one sum and its count."""
        self._sums[name] += float(total)
        self._counts[name] += int(count)

    def add_terms(self, terms: Mapping[str, SumCount]) -> None:
        """Adds what a task's `loss` gives."""
        for name, term in terms.items():
            self.add(name, term.sum, term.count)

    def mean(self, name: str) -> float | None:
        """Sum over count; None where nothing was counted."""
        return self._sums[name] / self._counts[name] if self._counts[name] else None
