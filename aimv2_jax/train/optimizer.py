"""AdamLH as an optax chain: clipping, Adam, fully decoupled decay, warm-up, cosine and cooldown (RECIPE.md §6, §10)."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

# Last key of a parameter's path -> parameters without weight decay. All others decay, also token table and heads.
NOT_DECAYED = {
    "bias": "biases",
    "scale": "norm gains",
    "position": "position tables",
    "begin": "the begin vector",
    "logit_scale": "the scale of contrastive logits",
    "logit_bias": "the bias of contrastive logits",
}

# config optimizer.schedule -> fraction of the cosine from peak_lr to end_lr that the schedule covers.
COSINE_PARTS = {"cosine": 1.0, "half_cosine": 0.5}

# (updates, step) -> learning rate of the next update after `updates` in `step` steps; `step` defaults to `updates`.
Schedule = Callable[..., Float[Array, ""]]


def learning_rate(
    *,
    start_lr: float,
    peak_lr: float | Float[Array, ""],
    end_lr: float,
    warmup_steps: int,
    schedule_steps: int,
    cosine_part: float = 1.0,
    cooldown_start: int | None = None,
    cooldown_steps: int = 1,
    cooldown_lr: float = 0.0,
) -> Schedule:
    """Linear warm-up from `start_lr` to `peak_lr`, cosine towards `end_lr`, and an optional linear cooldown.

    With warm-up W, schedule S and c = `cosine_part`, step s in W … S has

        rate(s) = end_lr + (peak_lr - end_lr) · cos²(π/2 · c · (s - W) / (S - W)),

    and from S on the rate is constant. c = 1 is the whole cosine, down to `end_lr`; c = 1/2 is its first half, down to
    (peak_lr + end_lr) / 2: the rate of the base run stays high enough that a cooldown can start at any of its steps,
    and still falls, so that late steps are less noisy.

    On this curve s counts updates: a skipped step does not advance the curve.

    A cooldown leaves the curve at step n = `cooldown_start` and falls linearly to `cooldown_lr` at step
    n + `cooldown_steps`; as with S, the run's last step is the one before. Step n itself has the curve's rate. The
    cooldown counts steps, because the run ends at a step: the rate reaches its end also if updates are skipped.

    Implemented here instead of with optax: in float32 optax's ramp (start - peak) · (1 - t) + peak gives the first step
    a rate 2e-5 off, and its 1 + cos loses digits towards the end.
    """

    def curve(updates: Int[Array, ""]) -> Float[Array, ""]:
        warm = jnp.asarray(updates, jnp.float32) / max(warmup_steps, 1)
        cool = jnp.clip((updates - warmup_steps) / (schedule_steps - warmup_steps), 0, 1)
        ramp = start_lr + (peak_lr - start_lr) * warm
        cosine = end_lr + (peak_lr - end_lr) * jnp.square(jnp.cos(jnp.pi / 2 * cosine_part * cool))
        return jnp.where(updates < warmup_steps, ramp, cosine)

    def rate(updates: Int[Array, ""], step: Int[Array, ""] | None = None) -> Float[Array, ""]:
        if cooldown_start is None:
            return curve(updates)
        step = updates if step is None else step
        skipped = step - updates
        top = curve(cooldown_start - skipped)
        left = jnp.clip((cooldown_start + cooldown_steps - step) / cooldown_steps, 0, 1)
        return jnp.where(step < cooldown_start, curve(updates), cooldown_lr + (top - cooldown_lr) * left)

    return rate


def is_decayed(params: Any) -> Any:
    """Returns for each parameter whether weight decay applies, by the last key of its path."""
    return jax.tree.map_with_path(lambda path, _: path[-1].key not in NOT_DECAYED, params)


def clip_by_global_norm(max_norm: float, eps: float) -> optax.GradientTransformation:
    """Scales by min(1, max_norm / (norm + eps)), like the reference; optax's clip has no eps."""

    def update(updates, state, params=None):
        del params
        factor = jnp.minimum(1.0, max_norm / (optax.tree.norm(updates) + eps))
        return jax.tree.map(lambda g: g * factor, updates), state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


def scale_by_rate(schedule: Schedule) -> optax.GradientTransformationExtraArgs:
    """`optax.scale_by_learning_rate` for a schedule that also takes the `step` passed to `update`."""

    def update(updates, state, params=None, *, step=None, **extra):
        del extra
        return optax.scale_by_schedule(lambda count: -schedule(count, step)).update(updates, state, params)

    return optax.GradientTransformationExtraArgs(optax.scale_by_schedule(schedule).init, update)


def adamlh(
    schedule: Schedule,
    *,
    peak_lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    clip_norm: float,
    clip_eps: float = 1e-6,
) -> optax.GradientTransformationExtraArgs:
    """p <- p (1 - wd · lr/peak) - lr · m̂ / (√v̂ + eps), after clipping the gradient by its global norm.

    This is AdamW with decay wd / peak, so it is a chain of optax transformations. `update` takes the `step` for
    `schedule`.
    """
    return optax.chain(
        clip_by_global_norm(clip_norm, clip_eps),
        optax.scale_by_adam(*betas, eps=eps),
        optax.add_decayed_weights(weight_decay / peak_lr, mask=is_decayed),
        scale_by_rate(schedule),
    )


def num_updates(opt_state: Any) -> Int[Array, ""]:
    """Number of updates of an `adamlh` state: steps minus skipped steps."""
    return opt_state[1].count


def ema_step(ema_params: Any, params: Any, steps: Int[Array, ""], decay: float) -> Any:
    """Updates the bias-corrected exponential average of the parameters after each of `steps` steps.

    The weight of step i is decay^(steps - i) over the sum of all weights, like Adam's bias correction: the first
    average equals the parameters after the first step at any decay, and excludes the initial parameters. So the average
    needs no warm-up.
    """
    rate = (1 - decay) / -jnp.expm1(steps * math.log(decay))  # 1 - decay^steps, without cancellation.
    return jax.tree.map(lambda mean, leaf: mean + rate * (leaf - mean), ema_params, params)


def decay_report(params: Any) -> str:
    """Lists which tensors are decayed and which are not, one per line, for the log and the golden list."""
    decayed = jax.tree.leaves_with_path(is_decayed(params))
    return "".join(
        f"{'decay   ' if keep else 'no decay'} {'/'.join(part.key for part in path)}\n" for path, keep in decayed
    )
