"""A grid of learning rates and weight decays, trained together: one program, every batch of features read once.

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
from jaxtyping import Array, Bool, Float, Int

Batch = tuple[Float[np.ndarray, "B L D"], Bool[np.ndarray, "B L"], Int[np.ndarray, " B"]]
"""Features, which patches are valid, and classes; a class of -1 is a row of padding."""

FULL_GRID = tuple(itertools.product((5e-5, 1e-4, 2e-4, 3e-4, 5e-4, 1e-3, 2e-3), (0.05, 0.1)))  # [P: Table A2]
SMALL_GRID = tuple(itertools.product((3e-4, 1e-3, 3e-3, 1e-2, 3e-2), (0.01, 0.1)))  # For some thousand pictures. [O]


@dataclasses.dataclass(frozen=True)
class Plan:
    """How a head is trained: AdamW, a cosine after the warm-up, every epoch in a new order. RECIPE.md §11."""

    grid: Sequence[tuple[float, float]]
    epochs: int
    warmup_epochs: int
    batch_size: int
    seed: int


_EPS = 1e-6  # RECIPE.md §11.


@dataclasses.dataclass(frozen=True)
class Standard:
    """Mean and variance of each feature over the train pictures: BatchNorm without affine, statistics taken once."""

    mean: Float[np.ndarray, " D"]
    inverse: Float[np.ndarray, " D"]

    @classmethod
    def of(
        cls, features: Float[np.ndarray, "N V L D"], valid: Bool[np.ndarray, "N L"], places: Int[np.ndarray, " P"]
    ) -> Standard:
        """The statistics of all valid patches in all views of the pictures at `places`."""
        total = np.zeros((2, features.shape[-1]))
        count = 0
        for place in places:  # In float64, a picture at a time: the whole may not fit.
            patches = features[place][:, valid[place]].reshape(-1, features.shape[-1]).astype(np.float64)
            total += patches.sum(0), np.square(patches).sum(0)
            count += len(patches)
        mean, square = total / max(count, 1)
        return cls(mean.astype(np.float32), (1 / np.sqrt(np.maximum(square - mean**2, 0) + _EPS)).astype(np.float32))

    @classmethod
    def none(cls, width: int) -> Standard:
        """Which changes nothing."""
        return cls(np.zeros(width, np.float32), np.ones(width, np.float32))


def train(
    head: nn.Module, standard: Standard, plan: Plan, steps_per_epoch: int, batches: Iterable[Batch], width: int
) -> Any:
    """The head's parameters of every point of the grid, stacked on a leading axis G.

    `batches` are those of all epochs; each point sees the same, and starts from the same parameters.
    """
    rates, decays = (jnp.array(column, jnp.float32) for column in zip(*plan.grid))
    warmup, total = plan.warmup_epochs * steps_per_epoch, plan.epochs * steps_per_epoch
    shape = optax.warmup_cosine_decay_schedule(0.0, 1.0, max(1, warmup), max(total, warmup + 1))
    adam = optax.scale_by_adam(b1=0.9, b2=0.999)
    params = head.init(jax.random.key(plan.seed), jnp.zeros((1, 1, width)), jnp.ones((1, 1), bool))["params"]

    def loss(params: Any, features: Array, valid: Array, classes: Array) -> Array:
        logits = head.apply({"params": params}, features, valid)
        counted = classes >= 0
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, classes.clip(0))
        return jnp.sum(losses * counted) / jnp.sum(counted).clip(1)

    @partial(jax.jit, donate_argnums=0)
    def step(
        state: Any, number: Array, mean: Array, inverse: Array, features: Array, valid: Array, classes: Array
    ) -> Any:
        features = (features.astype(jnp.float32) - mean) * inverse

        def one(state: Any, rate: Array, decay: Array) -> Any:
            params, moments = state
            gradients = jax.grad(loss)(params, features, valid, classes)
            updates, moments = adam.update(gradients, moments)
            scale = rate * shape(number)

            def move(path: Any, param: Array, update: Array) -> Array:
                kept = 1 - scale * decay if path[-1].key == "kernel" else 1.0
                return param * kept - scale * update

            return jax.tree_util.tree_map_with_path(move, params, updates), moments

        return jax.vmap(one, in_axes=(0, 0, 0))(state, rates, decays)

    copies = jax.tree.map(lambda leaf: jnp.broadcast_to(leaf, (len(plan.grid), *leaf.shape)), params)
    state = copies, jax.vmap(adam.init)(copies)
    for number, (features, valid, classes) in enumerate(batches):
        # The statistics are arguments, so that every encoder's heads are trained by one compiled program.
        state = step(state, jnp.int32(number), standard.mean, standard.inverse, features, valid, classes)
    return state[0]


def predict(
    head: nn.Module, standard: Standard, params: Any, batches: Iterable[Batch]
) -> Iterator[Float[np.ndarray, "G B C"]]:
    """Log-probabilities of every point of the grid, a batch at a time."""

    @jax.jit
    def run(params: Any, mean: Array, inverse: Array, features: Array, valid: Array) -> Array:
        features = (features.astype(jnp.float32) - mean) * inverse
        return jax.vmap(lambda one: nn.log_softmax(head.apply({"params": one}, features, valid)))(params)

    for features, valid, _ in batches:
        yield np.asarray(run(params, standard.mean, standard.inverse, features, valid))


def epochs_of(
    features: Float[np.ndarray, "N V L D"],
    valid: Bool[np.ndarray, "N L"],
    classes: Int[np.ndarray, " N"],
    places: Int[np.ndarray, " P"],
    plan: Plan,
) -> Iterator[Batch]:
    """The batches of all epochs: each picture of `places` once an epoch, in one of its views; the last is filled up."""
    rng = np.random.default_rng(plan.seed)
    for _ in range(plan.epochs):
        order, views = rng.permutation(places), rng.integers(features.shape[1], size=len(classes))
        for start in range(0, len(order), plan.batch_size):
            yield filled(features, valid, classes, order[start : start + plan.batch_size], views, plan.batch_size)


def in_order(
    features: Float[np.ndarray, "N V L D"],
    valid: Bool[np.ndarray, "N L"],
    places: Int[np.ndarray, " P"],
    batch_size: int,
) -> Iterator[Batch]:
    """Batches of the first view of the pictures at `places`, in order, to be predicted: their classes are not told."""
    unknown = np.zeros(len(features), int)
    for start in range(0, len(places), batch_size):
        yield filled(features, valid, unknown, places[start : start + batch_size], unknown, batch_size)


def filled(features: Any, valid: Any, classes: Any, rows: np.ndarray, views: np.ndarray, size: int) -> Batch:
    """The batch of the pictures at `rows`, each in its view of `views`, filled up to `size` rows."""
    missing = size - len(rows)
    numbers = np.concatenate([classes[rows], np.full(missing, -1)]).astype(np.int32)
    rows = np.concatenate([rows, np.repeat(rows[:1], missing)])
    return features[rows, views[rows]], valid[rows], numbers
