"""Heads on frozen features, trained at a grid of learning rates and weight decays together.

One program trains all points, so each batch of features is read once.

G points of the grid, B batch, L patches, D width, C classes.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn
from flax.core import meta
from jaxtyping import Array, Bool, Float, Int

from aimv2_jax.models.layers import xavier_uniform
from aimv2_jax.models.pooling import AttentionPool

Batch = tuple[Float[np.ndarray, "B L D"], Bool[np.ndarray, "B L"], Int[np.ndarray, " B"]]
"""Features, valid patches, and classes; a class of -1 marks a padding row."""

GRIDS = {  # (learning rate, weight decay) of each point.
    "small": tuple(itertools.product((3e-4, 1e-3, 3e-3, 1e-2, 3e-2), (0.01, 0.1))),  # For a few thousand images. [O]
    "full": tuple(itertools.product((5e-5, 1e-4, 2e-4, 3e-4, 5e-4, 1e-3, 2e-3), (0.05, 0.1))),  # [P: Table A2]
}
_EPS = 1e-6  # RECIPE.md §11.


@dataclasses.dataclass(frozen=True)
class SweepConfig:
    """Hyperparameters of a head's training: AdamW, warm-up and cosine, a new order in each epoch. RECIPE.md §11."""

    grid: Sequence[tuple[float, float]]
    epochs: int
    warmup_epochs: int
    batch_size: int
    seed: int


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
    """Mean and inverse standard deviation of each feature over train images: BatchNorm, no affine, fixed statistics."""

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


def train_sweep(
    head: nn.Module, norm: FeatureNorm, config: SweepConfig, steps_per_epoch: int, batches: Iterable[Batch], width: int
) -> Any:
    """Trains the head at every point of the grid; returns parameters stacked on a leading axis G.

    `batches` covers all epochs. Every point sees the same batches and starts from the same parameters.
    """
    rates, decays = (jnp.array(column, jnp.float32) for column in zip(*config.grid))
    warmup, total = config.warmup_epochs * steps_per_epoch, config.epochs * steps_per_epoch
    schedule = optax.warmup_cosine_decay_schedule(0.0, 1.0, max(1, warmup), max(total, warmup + 1))
    adam = optax.scale_by_adam(b1=0.9, b2=0.999)
    params = head.init(jax.random.key(config.seed), jnp.zeros((1, 1, width)), jnp.ones((1, 1), bool))["params"]
    params = meta.unbox(params)

    def loss(params: Any, features: Array, valid: Array, classes: Array) -> Array:
        logits = head.apply({"params": params}, features, valid)
        mask = classes >= 0
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, classes.clip(0))
        return jnp.sum(losses * mask) / jnp.sum(mask).clip(1)

    @partial(jax.jit, donate_argnums=0)
    def step(
        state: Any, step_index: Array, mean: Array, inv_std: Array, features: Array, valid: Array, classes: Array
    ) -> Any:
        features = (features.astype(jnp.float32) - mean) * inv_std

        def update_point(state: Any, rate: Array, decay: Array) -> Any:
            params, moments = state
            gradients = jax.grad(loss)(params, features, valid, classes)
            updates, moments = adam.update(gradients, moments)
            lr = rate * schedule(step_index)

            def apply_update(path: Any, param: Array, update: Array) -> Array:
                keep = 1 - lr * decay if path[-1].key == "kernel" else 1.0
                return param * keep - lr * update

            return jax.tree_util.tree_map_with_path(apply_update, params, updates), moments

        return jax.vmap(update_point, in_axes=(0, 0, 0))(state, rates, decays)

    copies = jax.tree.map(lambda leaf: jnp.broadcast_to(leaf, (len(config.grid), *leaf.shape)), params)
    state = copies, jax.vmap(adam.init)(copies)
    for step_index, (features, valid, classes) in enumerate(batches):
        # The statistics are arguments, so that every encoder's heads are trained by one compiled program.
        state = step(state, jnp.int32(step_index), norm.mean, norm.inv_std, features, valid, classes)
    return state[0]


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
