"""One training step, pure: state and batch in, state and metrics out."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import struct
from jaxtyping import Array, Float, Int

from aimv2_jax.train import guard, losses
from aimv2_jax.train.guard import GuardState
from aimv2_jax.train.optimizer import Schedule, num_updates, step_average
from aimv2_jax.train.task import Batch, PretrainTask, SumCount


class TrainState(struct.PyTreeNode):
    """All that training changes. `step` counts finished steps, and is the number of the next one."""

    step: Int[Array, ""]
    params: Any
    opt_state: Any
    guard: GuardState


class AveragedState(TrainState):
    """The same of a run that keeps an average of its parameters, which nothing of the training reads."""

    average: Any


def init_state(
    rng: jax.Array, task: PretrainTask, optimizer: optax.GradientTransformation, ema_decay: float = 0.0
) -> TrainState:
    """The state before step 0, a function of the run's key."""
    return fresh_state(task.init(rng), optimizer, ema_decay)


def fresh_state(params: Any, optimizer: optax.GradientTransformation, ema_decay: float = 0.0) -> TrainState:
    """The state before step 0 with these parameters; with a decay it has an average, still empty."""
    step = jnp.zeros((), jnp.int32)
    state = TrainState(step=step, params=params, opt_state=optimizer.init(params), guard=guard.fresh())
    return with_average(state, jax.tree.map(jnp.zeros_like, params)) if ema_decay else state


def with_average(state: TrainState, average: Any) -> AveragedState:
    """`state` and an average, or the like of their shapes or shardings."""
    return AveragedState(**vars(state), average=average)


def train_step(
    state: TrainState,
    batch: Batch,
    rng: jax.Array,
    prefix: Int[Array, " B"] | None = None,
    *,
    task: PretrainTask,
    optimizer: optax.GradientTransformationExtraArgs,
    schedule: Schedule,
    microbatches: int = 1,
    grad_shardings: Any = None,
    ema_decay: float = 0.0,
    skip_beyond: float | None = None,
    writes_in_order: bool = False,
) -> tuple[TrainState, dict[str, Array]]:
    """Forward, backward, clip, update. `rng` is the run's key; what is per example is folded in from its number.

    A step whose loss or gradient is not finite changes no parameter, nothing of the optimiser's, and no average; nor
    does, with `skip_beyond`, one whose loss or gradient norm is so many deviations above those before (guard.py). The
    learning rate follows the updates that were made, in a cooldown the steps.

    With `writes_in_order` nothing of the state is overwritten before all that reads it: XLA's CPU compiler copies the
    whole donated state unless it is told so (that of jax 0.10 drops the order, and copies all the same). A TPU's needs
    no telling, and computes the state in one pass.

    Returns the new state and float32 scalars: loss, loss_<name>, count_<name>, lr, grad_norm, param_norm;
    loss_deviations and grad_norm_deviations, how far above the last steps' they are; skipped, 1 where nothing was
    changed; nonfinite_steps, how many in a row were not finite; and patch_utilisation, the share of the batch's patches
    that is no padding.
    """
    sums, counts, grads = gradients(state.params, batch, rng, prefix, task, microbatches)
    if grad_shardings is not None:
        grads = jax.lax.with_sharding_constraint(grads, grad_shardings)
    updates, opt_state = optimizer.update(grads, state.opt_state, state.params, step=state.step)
    after = {"params": optax.apply_updates(state.params, updates), "opt_state": opt_state}
    if ema_decay:
        after["average"] = step_average(state.average, after["params"], num_updates(opt_state), ema_decay)

    loss, grad_norm = task.total(sums, counts), optax.tree.norm(grads)
    guarded, verdict = guard.judge(state.guard, loss, grad_norm)
    skipped = ~verdict.finite
    if skip_beyond is not None:
        skipped |= verdict.is_spike(skip_beyond)
    param_norm = optax.tree.norm(state.params)
    if writes_in_order:
        param_norm, skipped = jax.lax.optimization_barrier((param_norm, skipped))
    for name in sorted(after, key=("average", "params", "opt_state").index):  # Each is computed from those behind it.
        kept = jax.tree.map(partial(jnp.where, skipped), getattr(state, name), after[name])
        after[name], skipped = jax.lax.optimization_barrier((kept, skipped)) if writes_in_order else (kept, skipped)
    metrics = {
        "loss": loss,
        **{f"loss_{name}": losses.divide(total, counts[name]) for name, total in sums.items()},
        **{f"count_{name}": count.astype(jnp.float32) for name, count in counts.items()},
        "lr": schedule(num_updates(state.opt_state), state.step),
        "grad_norm": grad_norm,
        "param_norm": param_norm,
        "loss_deviations": verdict.loss_deviations,
        "grad_norm_deviations": verdict.grad_norm_deviations,
        "skipped": skipped.astype(jnp.float32),
        "nonfinite_steps": guarded.nonfinite.astype(jnp.float32),
        "patch_utilisation": jnp.mean(batch["valid"], dtype=jnp.float32),
    }
    return state.replace(step=state.step + 1, guard=guarded, **after), metrics


def gradients(
    params: Any,
    batch: Batch,
    rng: jax.Array,
    prefix: Int[Array, " B"] | None,
    task: PretrainTask,
    microbatches: int,
) -> tuple[dict[str, Float[Array, ""]], dict[str, Int[Array, ""]], Any]:
    """Loss sums, counts and the gradient of a step; `rng` and `prefix` as of `train_step`."""
    prefix = task.draw_prefix(rng, batch) if prefix is None else prefix
    batch = {**batch, **task.draw_kept(rng, batch)}
    counts = task.counts(batch, prefix)
    sums, grads = accumulate(params, batch, prefix, counts, task, microbatches)
    return sums, counts, grads


def accumulate(
    params: Any,
    batch: Batch,
    prefix: Int[Array, " B"],
    counts: dict[str, Int[Array, ""]],
    task: PretrainTask,
    microbatches: int,
) -> tuple[dict[str, Float[Array, ""]], Any]:
    """Loss sums and the gradient of the objective over a batch, taken in `microbatches` parts.

    Every part is divided by the counts of the whole batch, so the parts simply add up. Part j takes the rows j, j + k,
    …: each device's rows are contiguous, so it finds its share of every part at home.
    """

    def objective(params, batch, prefix):
        sums = {name: term.sum for name, term in task.loss(params, batch, prefix).items()}
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


def eval_step(params: Any, batch: Batch, prefix: Int[Array, " B"], *, task: PretrainTask) -> dict[str, SumCount]:
    """Loss sums and counts of one held-out batch at the given prefix lengths."""
    return task.loss(params, batch, prefix)
