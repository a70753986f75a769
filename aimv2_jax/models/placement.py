"""Where arrays lie while a step is traced: what the logical axis names of the rule table ask of a mesh.

Models name axes; `parallel/rules.py` sets mesh and rules (`rules.scope`). Without a mesh everything here is the plain
computation. Communication that matters is written out rather than left to the partitioner: a weight is gathered in the
compute type, and its gradient is summed by a reduce-scatter straight into the parameter's layout.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
from flax import linen as nn
from jax.experimental.layout import Layout, with_layout_constraint
from jax.sharding import PartitionSpec
from jaxtyping import Array

Axes = tuple[str, ...]


def by_device(run: Callable[..., Any], arrays: Sequence[tuple[Array, Axes]], out: Axes) -> Any:
    """`run(*arrays)` on every device's own part of them; `run` must need nothing of the others."""
    if jax.sharding.get_abstract_mesh().size <= 1:  # 0: no mesh.
        return run(*(array for array, _ in arrays))
    specs = tuple(nn.logical_to_mesh_axes(axes) for _, axes in arrays)
    return jax.shard_map(run, in_specs=specs, out_specs=nn.logical_to_mesh_axes(out), check_vma=False)(
        *(array for array, _ in arrays)
    )


def whole(weight: Array, axes: Axes) -> Array:
    """A weight as a device computes with it: gathered over the axes that split the batch, split over the others."""
    parts = _batch_parts()
    if parts is None:
        return weight
    kept = (
        tuple(name for name in _names(entry) if name not in parts) or None for entry in nn.logical_to_mesh_axes(axes)
    )
    return jax.lax.with_sharding_constraint(weight, PartitionSpec(*kept))


def sum_over_batch(partial: Callable[..., Array], rows: Sequence[Array], axes: Axes, reduce_dtype: Any) -> Array:
    """The sum over all devices of `partial(*rows)`, each over its own rows, laid out like a weight with `axes`.

    Reduce-scatter over the axes that split both batch and weight, then all-reduce over the rest of the batch's, the
    outermost (slices) last, when there is least left to send.

    Args:
      partial: from the rows of one device to an array of the weight's (whole) shape.
      rows: arrays whose first dimension is the batch.
      axes: the weight's logical axis names.
      reduce_dtype: type in which the sum travels.
    """
    parts = _batch_parts()
    if parts is None:
        return partial(*rows)
    spec = nn.logical_to_mesh_axes(axes)
    scattered = {name: dim for dim, entry in enumerate(spec) for name in _names(entry) if name in parts}

    def run(*rows):
        total = partial(*rows)
        dtype = total.dtype
        # Scattered along its minor dimension, which at some sizes the compiler makes it, an array falls into parts of
        # tiles, and libtpu sums it whole on every device.
        major = [*scattered.values(), *(dim for dim in range(total.ndim) if dim not in scattered.values())]
        total = with_layout_constraint(total.astype(reduce_dtype), Layout(tuple(major)))
        for name, dim in scattered.items():
            total = jax.lax.psum_scatter(total, name, scatter_dimension=dim, tiled=True)
        for name in reversed([name for name in parts if name not in scattered]):
            total = jax.lax.psum(total, name)
        return total.astype(dtype)

    out = PartitionSpec(*(tuple(name for name in _names(entry) if name in parts) or None for entry in spec))
    return jax.shard_map(
        run, in_specs=(PartitionSpec(parts),) * len(rows), out_specs=out, axis_names=set(parts), check_vma=False
    )(*rows)


def _batch_parts() -> tuple[str, ...] | None:
    """The mesh axes of more than one device that split the batch, outermost first; None without such a mesh."""
    shape = jax.sharding.get_abstract_mesh().shape
    (entry,) = nn.logical_to_mesh_axes(("batch",))
    parts = tuple(name for name in _names(entry) if shape.get(name, 1) > 1)
    return parts or None


def _names(entry: str | Sequence[str] | None) -> tuple[str, ...]:
    return (entry,) if isinstance(entry, str) else tuple(entry or ())
