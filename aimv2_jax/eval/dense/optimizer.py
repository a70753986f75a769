"""AdamW with the schedules of published dense probes."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from aimv2_jax.eval.dense.settings import DenseConfig

_EPS = 1e-8
_CLIP_EPS = 1e-6  # As in torch.nn.utils.clip_grad_norm_.
_CYCLE_BETA1 = (0.85, 0.95)
_CYCLE_START = 1 / 1000  # The first rate of a "cycle", as a share of the peak.

Moments = tuple[Any, Any]


def learning_rate(step: Int[Array, ""], config: DenseConfig) -> Float[Array, ""]:
    """The rate of a step: a cosine over all steps, from the peak to `final_rate`, under a warm-up.

    "linear" multiplies the warm-up by 1 - step / steps, "cycle" by the cosine: dinov3's WarmupOneCycleLR with and
    without `warmup_ratio`.
    """
    step = step.astype(jnp.float32)
    share = step / config.steps
    cosine = (1 + jnp.cos(jnp.pi * (step + 1) / config.steps)) / 2
    after = config.final_rate + (1 - config.final_rate) * cosine
    warm = step / max(1, config.warmup)
    if config.warmup_kind == "cycle":
        before = _CYCLE_START + warm * (1 + jnp.cos(jnp.pi * share)) / 2
    else:
        before = (1e-6 + (1 - 1e-6) * warm) * (1 - share)
    return config.rate * jnp.where(step < config.warmup, before, after)


def first_beta(step: Int[Array, ""], config: DenseConfig) -> Float[Array, ""]:
    """β1 of a step: constant; or for `beta1` None dinov3's: 0 in the warm-up, then a cosine from 0.85 to 0.95."""
    if config.beta1 is not None:
        return jnp.asarray(config.beta1, jnp.float32)
    low, high = _CYCLE_BETA1
    share = (step - config.warmup) / max(1, config.steps - config.warmup)
    cycled = high + (low - high) * (1 + jnp.cos(jnp.pi * share)) / 2
    return jnp.where(step < config.warmup, 0.0, cycled)


def initial_moments(params: Any) -> Moments:
    """Zero moments of every parameter."""
    return jax.tree.map(jnp.zeros_like, params), jax.tree.map(jnp.zeros_like, params)


def adamw(
    step: Int[Array, ""], params: Any, gradients: Any, moments: Moments, config: DenseConfig
) -> tuple[Any, Moments]:
    """The parameters and moments after a step of PyTorch's AdamW, which decays every parameter."""
    rate, beta1, beta2 = learning_rate(step, config), first_beta(step, config), config.beta2
    if config.clip is not None:
        norm = jnp.sqrt(sum(jnp.sum(jnp.square(leaf)) for leaf in jax.tree.leaves(gradients)))
        factor = jnp.minimum(1.0, config.clip / (norm + _CLIP_EPS))
        gradients = jax.tree.map(lambda leaf: leaf * factor, gradients)
    means = jax.tree.map(lambda mean, leaf: beta1 * mean + (1 - beta1) * leaf, moments[0], gradients)
    squares = jax.tree.map(lambda square, leaf: beta2 * square + (1 - beta2) * leaf**2, moments[1], gradients)
    count = (step + 1).astype(jnp.float32)
    first, second = 1 - beta1**count, 1 - beta2**count

    def update(param: Array, mean: Array, square: Array) -> Array:
        decayed = param * (1 - rate * config.weight_decay)
        return decayed - rate * (mean / first) / (jnp.sqrt(square / second) + _EPS)

    return jax.tree.map(update, params, means, squares), (means, squares)
