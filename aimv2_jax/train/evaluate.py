"""Held-out losses during training: all losses at fixed prefix lengths, the text loss also at full prefix."""

from __future__ import annotations

import collections
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import jax
import numpy as np

from aimv2_jax.data import pipeline
from aimv2_jax.errors import TrainingAborted, UserError
from aimv2_jax.monitoring.events import EventKind, TimeClass
from aimv2_jax.monitoring.log import logger
from aimv2_jax.train.builder import TrainSetup
from aimv2_jax.train.resources import Resources
from aimv2_jax.train.step import TrainState
from aimv2_jax.train.task import SumCount, merge

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
    ema_params: Any = None,
) -> dict[str, float]:
    """Computes the losses of `params` over held-out batches.

    Args:
      setup: provides the task and the evaluation settings.
      params: parameters of the task, the whole tree.
      batches: this process' rows of each batch (docs/architecture.md, "Batch").
      put: makes global arrays of such rows.
      ema_params: averaged parameters, whose losses are returned under the same names with the suffix `_ema`.

    Returns:
      `eval_loss`, `eval_loss_<name>` (sums over all prefixes, caption types and examples, divided once) and
      `eval_loss_text_full_prefix`, with full attention over the image. An encoder that is trained with full attention
      uses it for all losses.

    Raises:
      UserError: if a loss has no terms, which must not be reported as a loss of 0.
    """
    task = setup.task
    prefixes = setup.config.eval.prefixes if task.random_prefix else ()
    evaluated = {"": params} | ({} if ema_params is None else {"_ema": ema_params})
    totals = {suffix: (Totals(), Totals()) for suffix in evaluated}
    for arrays in batches:
        batch = put(arrays)
        fixed = [put({"prefix": prefix})["prefix"] for prefix in fixed_prefixes(prefixes, arrays["valid"])]
        full = put({"prefix": full_prefix(arrays["valid"])})["prefix"]
        for suffix, (at_fixed, at_full) in totals.items():
            for prefix in fixed:
                at_fixed.add_terms(setup.eval_sums(evaluated[suffix], batch, prefix))
            if not prefixes or "text" in task.weights:
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


class _StopRequested(Exception):
    """The run was asked to stop while it was evaluating."""


class Evaluator:
    """Evaluates the states of a run, and logs their held-out losses.

    Args:
      setup: the config on its mesh.
      resources: of the run.
      stop_requested: whether to abandon the evaluation; the same on all processes, which ask equally often.
    """

    def __init__(self, setup: TrainSetup, resources: Resources, stop_requested: Callable[[], bool]):
        config = setup.config
        # Without evaluation, eval.batch_size need not fit the devices.
        self._rows = setup.local_rows(config.eval.batch_size) if config.eval.sources else range(0)
        self._setup = setup
        self._resources = resources
        self._stop_requested = stop_requested

    def evaluate(self, number: int, state: TrainState) -> dict[str, float] | None:
        """The held-out losses of the state after step `number`; None where a stop request interrupted the evaluation.

        Raises:
          TrainingAborted: for a loss that is not finite.
        """
        setup = self._setup
        resources = self._resources
        begin_s = time.monotonic()
        put = partial(
            pipeline.to_devices,
            sharding=setup.batch_sharding,
            rows=self._rows,
            global_rows=setup.config.eval.batch_size,
        )
        faults: list[pipeline.BadExample] = []
        ema_params = None if state.ema_params is None else merge(state.ema_params, state.frozen)
        try:
            with (
                resources.time_accounting.on(TimeClass.EVALUATION),
                resources.watchdog.watching("evaluation", number),
            ):
                values = evaluate(setup, merge(state.params, state.frozen), self._batches(faults), put, ema_params)
        except _StopRequested:
            logger.info(f"asked to stop: the evaluation of step {number} is abandoned")
            return None
        names = [name for name in ("eval_loss", "eval_loss_ema") if name in values]
        for name in names:
            if not math.isfinite(values[name]):
                raise TrainingAborted(
                    f"{name} is {values[name]} at step {number}; nothing of it is saved, "
                    f"{resources.newest_checkpoint()}"
                )
        resources.bad_records.write(number, faults)
        resources.writer.write(number, values | {"eval_bad_records": len(faults)})
        seconds = round(time.monotonic() - begin_s, 3)
        resources.events.write(EventKind.EVALUATION, number, seconds=seconds, eval_loss=values[names[-1]])
        losses = "  ".join(f"{name.removeprefix('eval_')} {value:.4f}" for name, value in values.items())
        left_out = f"  ({len(faults)} bad records left out)" if faults else ""
        logger.info(f"step {number:,}  held out: {losses}{left_out}")
        return values

    def _batches(self, faults: list[pipeline.BadExample]) -> Iterator[dict[str, np.ndarray]]:
        """This process' rows of the held-out batches; records that cannot be used are added to `faults`.

        Raises:
          _StopRequested: between two batches. All processes have the same number of batches.
        """
        config = self._setup.config
        tokenizer, sources = self._resources.tokenizer, self._resources.sources.held_out
        for _, host in pipeline.evaluation_batches(config, self._rows, tokenizer, sources):
            if self._stop_requested():
                raise _StopRequested
            faults += host.faults
            yield {name: array for name, array in host.arrays.items() if name not in pipeline.BOOKKEEPING}
