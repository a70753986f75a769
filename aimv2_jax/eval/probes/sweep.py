"""Heads on frozen features, trained at a grid of learning rates and weight decays together.

One program trains all points, so each batch of features is read once.

G points of the grid, B batch, L patches, D width, C classes.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn
from flax.core import meta
from jaxtyping import Array, Bool, Float, Int

from aimv2_jax.models.layers import xavier_uniform
from aimv2_jax.models.pooling import AttentionPool
from aimv2_jax.train.optimizer import clip_by_global_norm, learning_rate

Batch = tuple[Float[np.ndarray, "B L D"], Bool[np.ndarray, "B L"], Int[np.ndarray, " B"]]
"""Features, valid patches, and classes; a class of -1 marks a padding row."""

GRIDS = {  # (learning rate, weight decay) of each point.
    "small": tuple(itertools.product((3e-4, 1e-3, 3e-3, 1e-2, 3e-2), (0.01, 0.1))),  # For a few thousand images. [O]
    "full": tuple(itertools.product((5e-5, 1e-4, 2e-4, 3e-4, 5e-4, 1e-3, 2e-3), (0.05, 0.1))),  # [P: Table A2]
}
_EPS = 1e-6  # RECIPE.md §11.
_CLIP_EPS = 1e-6  # As torch's clip_grad_norm_.
_MOMENTUM = 0.1  # torch's default for BatchNorm.

Statistics = tuple[Float[Array, " D"], Float[Array, " D"]]
"""Mean and inverse standard deviation that are fixed, or running mean and variance."""


@dataclasses.dataclass(frozen=True)
class SweepConfig:
    """Hyperparameters of a head's training: AdamW, warm-up and cosine, a new order in each epoch. RECIPE.md §11.

    Each rate ends at `min_lr`. The gradient of a point of the grid is clipped to `clip_norm`, unless that is None.
    Matrices are decayed, or all parameters.
    """

    grid: Sequence[tuple[float, float]]
    epochs: int
    warmup_epochs: int
    batch_size: int
    seed: int
    min_lr: float = 0.0
    clip_norm: float | None = None
    decay: Literal["matrices", "all"] = "matrices"


class AttentiveHead(nn.Module):
    """A learned query over all patches, and a linear layer (RECIPE.md §11)."""

    heads: int
    classes: int

    @nn.compact
    def __call__(self, features: Float[Array, "B L D"], valid: Bool[Array, "B L"]) -> Float[Array, "B C"]:
        pooled = AttentionPool(self.heads, name="pool")(features, valid)
        return nn.Dense(self.classes, kernel_init=xavier_uniform, name="classes")(pooled)


class LinearHead(nn.Module):
    """A linear layer on one feature vector an image (L = 1)."""

    classes: int

    @nn.compact
    def __call__(self, features: Float[Array, "B L D"], valid: Bool[Array, "B L"]) -> Float[Array, "B C"]:
        return nn.Dense(self.classes, kernel_init=xavier_uniform, name="classes")(features[:, 0])


@dataclasses.dataclass(frozen=True)
class FeatureNorm:
    """Mean and inverse standard deviation of each feature over train images: BatchNorm without affine in prediction."""

    mean: Float[np.ndarray, " D"]
    inv_std: Float[np.ndarray, " D"]

    @classmethod
    def fit(
        cls, features: Float[np.ndarray, "N V L D"], valid: Bool[np.ndarray, "N L"], indices: Int[np.ndarray, " P"]
    ) -> FeatureNorm:
        """The statistics of all valid patches in all views of the images at `indices`."""
        total = np.zeros((2, features.shape[-1]))
        count = 0
        for index in indices:  # One image at a time in float64: a float64 copy of all may not fit in memory.
            patches = features[index][:, valid[index]].reshape(-1, features.shape[-1]).astype(np.float64)
            total += patches.sum(0), np.square(patches).sum(0)
            count += len(patches)
        mean, square = total / max(count, 1)
        return cls(mean.astype(np.float32), (1 / np.sqrt(np.maximum(square - mean**2, 0) + _EPS)).astype(np.float32))

    @classmethod
    def identity(cls, width: int) -> FeatureNorm:
        """A norm that changes nothing."""
        return cls(np.zeros(width, np.float32), np.ones(width, np.float32))


@dataclasses.dataclass(frozen=True)
class TrainedHeads:
    """Parameters stacked on a leading axis G, the norm of their features, and the loss of every step."""

    params: Any
    norm: FeatureNorm
    losses: Float[np.ndarray, "steps G"]


def train_sweep(
    head: nn.Module,
    norm: FeatureNorm | None,
    config: SweepConfig,
    steps_per_epoch: int,
    batches: Iterable[Batch],
    width: int,
) -> TrainedHeads:
    """Trains the head at every point of the grid.

    Every point sees the same batches and starts from the same parameters.

    Args:
      norm: fixed statistics of the features; None: BatchNorm, whose running averages standardise in prediction.
      batches: those of all epochs.
      width: of the features.
    """
    rates, decays = (jnp.array(column, jnp.float32) for column in zip(*config.grid))
    warmup, total = config.warmup_epochs * steps_per_epoch, config.epochs * steps_per_epoch
    adam = optax.scale_by_adam(b1=0.9, b2=0.999)
    clip = optax.identity() if config.clip_norm is None else clip_by_global_norm(config.clip_norm, _CLIP_EPS)
    params = head.init(jax.random.key(config.seed), jnp.zeros((1, 1, width)), jnp.ones((1, 1), bool))["params"]
    params = meta.unbox(params)

    def loss_of(params: Any, features: Array, valid: Array, classes: Array) -> Array:
        logits = head.apply({"params": params}, features, valid)
        mask = classes >= 0
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, classes.clip(0))
        return jnp.sum(losses * mask) / jnp.sum(mask).clip(1)

    @partial(jax.jit, donate_argnums=0)
    def step(
        state: Any, statistics: Statistics, step_index: Array, features: Array, valid: Array, classes: Array
    ) -> tuple[Any, Statistics, Array]:
        features = features.astype(jnp.float32)
        if norm is None:
            features, statistics = _batch_norm(features, valid & (classes >= 0)[:, None], statistics)
        else:
            mean, inv_std = statistics
            features = (features - mean) * inv_std

        def update_point(state: Any, rate: Array, decay: Array) -> Any:
            params, moments = state
            loss, gradients = jax.value_and_grad(loss_of)(params, features, valid, classes)
            gradients, _ = clip.update(gradients, clip.init(params))
            updates, moments = adam.update(gradients, moments)
            schedule = learning_rate(
                start_lr=0.0, peak_lr=rate, end_lr=config.min_lr, warmup_steps=warmup, schedule_steps=total
            )
            lr = schedule(step_index)

            def apply_update(path: Any, param: Array, update: Array) -> Array:
                decayed = config.decay == "all" or path[-1].key == "kernel"
                return param * (1 - lr * decay if decayed else 1.0) - lr * update

            return (jax.tree_util.tree_map_with_path(apply_update, params, updates), moments), loss

        state, loss_G = jax.vmap(update_point)(state, rates, decays)
        return state, statistics, loss_G

    copies = jax.tree.map(lambda leaf: jnp.broadcast_to(leaf, (len(config.grid), *leaf.shape)), params)
    state = copies, jax.vmap(adam.init)(copies)
    # Statistics are arguments, so that every encoder's heads are trained by one compiled program.
    statistics = (jnp.zeros(width), jnp.ones(width)) if norm is None else (norm.mean, norm.inv_std)
    losses = []
    for step_index, batch in enumerate(batches):
        state, statistics, loss_G = step(state, statistics, jnp.int32(step_index), *batch)
        losses.append(loss_G)
    if norm is None:
        mean, variance = map(np.asarray, statistics)
        norm = FeatureNorm(mean, (1 / np.sqrt(variance + _EPS)).astype(np.float32))
    return TrainedHeads(state[0], norm, np.stack(jax.device_get(losses)))


def _batch_norm(
    features: Float[Array, "B L D"], valid: Bool[Array, "B L"], running: Statistics
) -> tuple[Float[Array, "B L D"], Statistics]:
    """Features standardised over the valid patches of the batch, and the running mean and variance after it."""
    weights, count = valid[..., None], valid.sum()
    mean = (features * weights).sum((0, 1)) / count
    centred = features - mean
    variance = (jnp.square(centred) * weights).sum((0, 1)) / count
    # As in torch, the running variance is of the unbiased ones.
    new = mean, variance * count / (count - 1).clip(1)
    averages = tuple(old + _MOMENTUM * (value - old) for old, value in zip(running, new))
    return centred * jax.lax.rsqrt(variance + _EPS), averages


def predict(
    head: nn.Module, norm: FeatureNorm, params: Any, batches: Iterable[Batch]
) -> Iterator[Float[np.ndarray, "G B C"]]:
    """Log-probabilities of every point of the grid, a batch at a time."""

    @jax.jit
    def run(params: Any, mean: Array, inv_std: Array, features: Array, valid: Array) -> Array:
        features = (features.astype(jnp.float32) - mean) * inv_std
        return jax.vmap(lambda point: nn.log_softmax(head.apply({"params": point}, features, valid)))(params)

    for features, valid, _ in batches:
        yield np.asarray(run(params, norm.mean, norm.inv_std, features, valid))


def epoch_batches(
    features: Float[np.ndarray, "N V L D"],
    valid: Bool[np.ndarray, "N L"],
    classes: Int[np.ndarray, " N"],
    indices: Int[np.ndarray, " P"],
    config: SweepConfig,
) -> Iterator[Batch]:
    """The batches of all epochs: each image of `indices` once an epoch in a random view; the last batch is padded."""
    rng = np.random.default_rng(config.seed)
    for _ in range(config.epochs):
        order, views = rng.permutation(indices), rng.integers(features.shape[1], size=len(classes))
        for start in range(0, len(order), config.batch_size):
            rows = order[start : start + config.batch_size]
            yield padded_batch(features, valid, classes, rows, views, config.batch_size)


def ordered_batches(
    features: Float[np.ndarray, "N V L D"],
    valid: Bool[np.ndarray, "N L"],
    indices: Int[np.ndarray, " P"],
    batch_size: int,
) -> Iterator[Batch]:
    """Batches for prediction: the first view of the images at `indices`, in order, with all classes 0."""
    zeros = np.zeros(len(features), int)
    for start in range(0, len(indices), batch_size):
        yield padded_batch(features, valid, zeros, indices[start : start + batch_size], zeros, batch_size)


def padded_batch(features: Any, valid: Any, classes: Any, rows: np.ndarray, views: np.ndarray, size: int) -> Batch:
    """The batch of the images at `rows`, each in its view of `views`, padded to `size` rows."""
    missing = size - len(rows)
    batch_classes = np.concatenate([classes[rows], np.full(missing, -1)]).astype(np.int32)
    rows = np.concatenate([rows, np.repeat(rows[:1], missing)])
    return features[rows, views[rows]], valid[rows], batch_classes
