"""Pure train and evaluation steps."""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import struct
from jaxtyping import Array, Bool, Float, Int

from aimv2_jax.train import anomaly, losses
from aimv2_jax.train.anomaly import AnomalyState
from aimv2_jax.train.optimizer import Schedule, ema_step, num_updates
from aimv2_jax.train.task import Batch, ModelTask, SumCount, merge


class TrainState(struct.PyTreeNode):
    """Training state.

    Attributes:
      step: number of completed steps, and the index of the next one.
      params: the trained parameters.
      opt_state: state of the optimiser.
      anomaly: window of recent losses and gradient norms.
      ema_params: exponential average of the parameters, which training itself does not read; None without one.
      frozen: parameters that stay as they are (`ModelTask.frozen`); None without any.
    """

    step: Int[Array, ""]
    params: Any
    opt_state: Any
    anomaly: AnomalyState
    ema_params: Any = None
    frozen: Any = None


@dataclasses.dataclass(frozen=True)
class StepOptions:
    """Static options of the train step.

    Attributes:
      microbatches: number of parts of a batch, over which the gradient is accumulated.
      grad_shardings: shardings of the gradient; by default the compiler chooses them.
      ema_decay: decay of `ema_params`; 0 keeps no average.
      skip_sigma: a step whose loss or gradient norm is more standard deviations above the recent ones (anomaly.py)
        changes nothing.
      writes_in_order: overwrites no part of the state before everything that reads it. Otherwise XLA's CPU compiler
        copies the whole donated state (jax 0.10's drops the order and copies anyway). The TPU compiler does not need
        the order, and computes the state in one pass.
    """

    microbatches: int = 1
    grad_shardings: Any = None
    ema_decay: float = 0.0
    skip_sigma: float | None = None
    writes_in_order: bool = False


def init_state(
    rng: jax.Array, task: ModelTask, optimizer: optax.GradientTransformation, ema_decay: float = 0.0
) -> TrainState:
    """Initialises the state before step 0 from the run's key."""
    return initial_state(task.init(rng), task, optimizer, ema_decay)


def initial_state(
    all_params: Any, task: ModelTask, optimizer: optax.GradientTransformation, ema_decay: float = 0.0
) -> TrainState:
    """Returns the state before step 0 with the given parameters; with `ema_decay` their average starts at zero."""
    params, frozen = task.split(all_params)
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        opt_state=optimizer.init(params),
        anomaly=anomaly.initial_state(),
        ema_params=jax.tree.map(jnp.zeros_like, params) if ema_decay else None,
        frozen=frozen,
    )


def train_step(
    state: TrainState,
    batch: Batch,
    rng: jax.Array,
    prefix: Int[Array, " B"] | None = None,
    *,
    task: ModelTask,
    optimizer: optax.GradientTransformationExtraArgs,
    schedule: Schedule,
    options: StepOptions,
) -> tuple[TrainState, dict[str, Array]]:
    """Forward, backward, clip, update. `rng` is the run's key; per-example keys fold in the example index.

    A step with a non-finite loss or gradient norm changes neither parameters, optimiser state nor their average. The
    learning rate follows the number of updates, in a cooldown the number of steps.

    Returns the new state and float32 scalars: loss, loss_<name>, count_<name>, lr, grad_norm, param_norm;
    loss_zscore and grad_norm_zscore, standard deviations above the recent steps; skipped, 1 if nothing was changed;
    nonfinite_steps, the number of consecutive non-finite steps; and patch_utilisation, the share of the batch's patches
    that is not padding.
    """
    sums, counts, grads = gradients(state.params, batch, rng, prefix, task, options.microbatches, state.frozen)
    if options.grad_shardings is not None:
        grads = jax.lax.with_sharding_constraint(grads, options.grad_shardings)
    updates, opt_state = optimizer.update(grads, state.opt_state, state.params, step=state.step)
    updated = {"params": optax.apply_updates(state.params, updates), "opt_state": opt_state}
    if options.ema_decay:
        decay = options.ema_decay
        updated["ema_params"] = ema_step(state.ema_params, updated["params"], num_updates(opt_state), decay)

    loss = task.total(sums, counts)
    grad_norm = optax.tree.norm(grads)
    anomaly_state, report = anomaly.detect_anomalies(state.anomaly, loss, grad_norm)
    skipped = ~report.finite
    if options.skip_sigma is not None:
        skipped |= report.is_spike(options.skip_sigma)
    param_norm = optax.tree.norm(state.params)
    updated, skipped, param_norm = _skip(state, updated, skipped, param_norm, options.writes_in_order)
    metrics = {
        "loss": loss,
        **{f"loss_{name}": losses.safe_divide(total, counts[name]) for name, total in sums.items()},
        **{f"count_{name}": count.astype(jnp.float32) for name, count in counts.items()},
        "lr": schedule(num_updates(state.opt_state), state.step),
        "grad_norm": grad_norm,
        "param_norm": param_norm,
        "loss_zscore": report.loss_zscore,
        "grad_norm_zscore": report.grad_norm_zscore,
        "skipped": skipped.astype(jnp.float32),
        "nonfinite_steps": anomaly_state.nonfinite.astype(jnp.float32),
        "patch_utilisation": jnp.mean(batch["valid"], dtype=jnp.float32),
    }
    return state.replace(step=state.step + 1, anomaly=anomaly_state, **updated), metrics


def _skip(
    state: TrainState,
    updated: dict[str, Any],
    skipped: Bool[Array, ""],
    param_norm: Float[Array, ""],
    writes_in_order: bool,
) -> tuple[dict[str, Any], Bool[Array, ""], Float[Array, ""]]:
    """Keeps the parts of the old state where the step is `skipped`; with `writes_in_order` after all else is read."""
    if writes_in_order:
        param_norm, skipped = jax.lax.optimization_barrier((param_norm, skipped))
    chosen = {}
    # In this order, because each entry is computed from the later ones.
    for name in sorted(updated, key=("ema_params", "params", "opt_state").index):
        chosen[name] = jax.tree.map(partial(jnp.where, skipped), getattr(state, name), updated[name])
        if writes_in_order:
            chosen[name], skipped = jax.lax.optimization_barrier((chosen[name], skipped))
    return chosen, skipped, param_norm


def gradients(
    params: Any,
    batch: Batch,
    rng: jax.Array,
    prefix: Int[Array, " B"] | None,
    task: ModelTask,
    microbatches: int,
    frozen: Any = None,
) -> tuple[dict[str, Float[Array, ""]], dict[str, Int[Array, ""]], Any]:
    """Computes loss sums, counts and the gradient by `params` of a step; `rng` and `prefix` as in `train_step`."""
    prefix = task.sample_prefix(rng, batch) if prefix is None else prefix
    batch = {**batch, **task.sample_kept_tokens(rng, batch)}
    counts = task.counts(batch, prefix)
    sums, grads = accumulate(params, batch, prefix, counts, task, microbatches, frozen)
    return sums, counts, grads


def accumulate(
    params: Any,
    batch: Batch,
    prefix: Int[Array, " B"],
    counts: dict[str, Int[Array, ""]],
    task: ModelTask,
    microbatches: int,
    frozen: Any = None,
) -> tuple[dict[str, Float[Array, ""]], Any]:
    """Computes loss sums and the gradient of the objective over a batch, accumulated over `microbatches`.

    Each microbatch is divided by the counts of the whole batch, so sums and gradients add up. Microbatch j takes the
    rows j, j + k, …: each device holds contiguous rows, so its share of every microbatch is local.
    """

    def objective(params, batch, prefix):
        sums = task.loss_sums(merge(params, frozen), batch, prefix)
        return task.total(sums, counts), sums

    def gradient(rows):
        (_, sums), grads = jax.value_and_grad(objective, has_aux=True)(params, *rows)
        return sums, grads

    rows = (dict(batch), prefix)
    if microbatches == 1:
        return gradient(rows)
    parts = jax.tree.map(lambda x: jnp.moveaxis(x.reshape(-1, microbatches, *x.shape[1:]), 1, 0), rows)
    zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), jax.eval_shape(gradient, rows))
    return jax.lax.scan(lambda total, part: (jax.tree.map(jnp.add, total, gradient(part)), None), zeros, parts)[0]


def eval_step(params: Any, batch: Batch, prefix: Int[Array, " B"], *, task: ModelTask) -> dict[str, SumCount]:
    """Computes loss sums and counts of one held-out batch at the given prefix lengths; `params` is the whole tree."""
    return task.loss(params, batch, prefix)
