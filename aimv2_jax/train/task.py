"""A task maps parameters and a batch to loss sums and counts; what all tasks share.

Batch: see docs/architecture.md, "Batch". B batch.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from functools import cached_property
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.core import meta
from jaxtyping import Array, Bool, Float, Int

from aimv2_jax.train import losses

Batch = Mapping[str, jax.Array]
Params = Any


class SumCount(NamedTuple):
    """An undivided loss: its sum and its number of terms, both over the given rows."""

    sum: Float[Array, ""]
    count: Int[Array, ""]


class ModelTask:
    """A task (docs/architecture.md, "Task"): total = Σ weights[name] · sum / count.

    A loss that is missing from `weights` is not computed. `params` is the whole tree of parameters; its entries named
    in `frozen` are never trained. A subclass initialises by `_init_named`, which may box parameters with the logical
    names of their axes.

    Attributes:
      weights: weight of each loss, by name.
      frozen: names of the top-level entries of the parameters that stay as they are.
      random_prefix: whether losses depend on the prefix length, so that evaluation measures them at several.
    """

    weights: Mapping[str, float]
    frozen: tuple[str, ...] = ()
    random_prefix: bool = False

    def _init_named(self, rng: jax.Array) -> Any:
        raise NotImplementedError

    def counts(self, batch: Batch, prefix: Int[Array, " B"]) -> dict[str, Int[Array, ""]]:
        """Number of terms of each loss, known before the forward pass, so that microbatches can be weighted."""
        raise NotImplementedError

    def loss_sums(self, params: Params, batch: Batch, prefix: Int[Array, " B"]) -> dict[str, Float[Array, ""]]:
        """Computes the sum of every loss in `weights`."""
        raise NotImplementedError

    def sample_prefix(self, rng: jax.Array, batch: Batch) -> Int[Array, " B"]:
        """Prefix lengths of a training batch; by default all patches."""
        del rng
        return jnp.full(batch["valid"].shape[:1], batch["valid"].shape[1], jnp.int32)

    def sample_kept_tokens(self, rng: jax.Array, batch: Batch) -> dict[str, Int[Array, "B K"]]:
        """Entry `kept` of a training batch, the encoder rows that a decoder receives; empty if it receives all."""
        del rng, batch
        return {}

    def init(self, rng: jax.Array) -> Params:
        """Initialises the parameters, as a function of `rng` only."""
        return meta.unbox(self._init_named(rng))

    def logical_axes(self) -> Any:
        """The logical axis names of every parameter, as a tree of PartitionSpecs shaped like the parameters."""
        return nn.get_partition_spec(self.abstract_named)

    @cached_property
    def abstract_named(self) -> Any:
        """Shapes and types of the parameters, boxed with the logical names of their axes."""
        return jax.eval_shape(self._init_named, abstract_key())

    @property
    def abstract_params(self) -> Params:
        """Shapes and types of the parameters."""
        return jax.eval_shape(meta.unbox, self.abstract_named)  # Traced, because unboxing constrains layouts on a mesh.

    def loss(self, params: Params, batch: Batch, prefix: Int[Array, " B"]) -> dict[str, SumCount]:
        """Computes sum and count of every loss in `weights`."""
        counts = self.counts(batch, prefix)
        sums = self.loss_sums(params, batch, prefix)
        return {name: SumCount(total, counts[name]) for name, total in sums.items()}

    def total(self, sums: Mapping[str, jax.Array], counts: Mapping[str, jax.Array]) -> Float[Array, ""]:
        """Computes the objective from sums over some rows and counts over the whole batch."""
        return sum(weight * losses.safe_divide(sums[name], counts[name]) for name, weight in self.weights.items())

    def split(self, params: Params) -> tuple[Params, Params]:
        """Splits a tree with the structure of the parameters into the trained and the frozen part; None if empty."""
        trained = {name: part for name, part in params.items() if name not in self.frozen}
        frozen = {name: part for name, part in params.items() if name in self.frozen}
        return trained, frozen or None


def merge(params: Params, frozen: Params) -> Params:
    """The whole tree of parameters, the inverse of `ModelTask.split`."""
    return params if frozen is None else {**params, **frozen}


def is_example(batch: Batch) -> Bool[Array, " B"]:
    """Marks the rows that are examples; the others are padding, without a valid patch."""
    return jnp.any(batch["valid"], axis=1)


def run_key(seed: int) -> jax.Array:
    """Returns the key of a run. The generator is explicit, independent of jax's default."""
    return jax.random.key(seed, impl="threefry2x32")


def abstract_key() -> jax.ShapeDtypeStruct:
    """Shape and type of a run's key, for tracing without real devices."""
    return jax.eval_shape(lambda: run_key(0))


def purpose_key(rng: jax.Array, purpose: str) -> jax.Array:
    """Derives the key for one purpose, so that no two purposes share random numbers."""
    return jax.random.fold_in(rng, zlib.crc32(purpose.encode()))
