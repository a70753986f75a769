"""Explicit collectives on logical axes: local map, all-gather of weights and rows, reduce-scatter of gradients.

Models name axes; `parallel/rules.py` sets mesh and rules (`rules.scope`). Without a mesh these functions are the plain
computation. The expensive communication is explicit instead of left to the partitioner: a weight is gathered in the
compute dtype, and its gradient is reduce-scattered directly into the parameter's layout.
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


def map_local(function: Callable[..., Any], arrays: Sequence[tuple[Array, Axes]], out: Axes) -> Any:
    """Applies `function(*arrays)` to each device's local shards; it reads others only by `all_gather_rows`."""
    if jax.sharding.get_abstract_mesh().size <= 1:  # The size is 0 without a mesh.
        return function(*(array for array, _ in arrays))
    specs = tuple(nn.logical_to_mesh_axes(axes) for _, axes in arrays)
    return jax.shard_map(function, in_specs=specs, out_specs=nn.logical_to_mesh_axes(out), check_vma=False)(
        *(array for array, _ in arrays)
    )


def all_gather_weight(weight: Array, axes: Axes) -> Array:
    """All-gathers a weight over the mesh axes that split the batch; it stays sharded over the others."""
    batch_axes = _batch_axes()
    if batch_axes is None:
        return weight
    spec = (
        tuple(name for name in _names(entry) if name not in batch_axes) or None
        for entry in nn.logical_to_mesh_axes(axes)
    )
    return jax.lax.with_sharding_constraint(weight, PartitionSpec(*spec))


def all_gather_rows(rows: Array) -> Array:
    """All-gathers the batch from the local rows, within a function of `map_local`; gradients are reduce-scattered."""
    batch_axes = _batch_axes()
    return rows if batch_axes is None else jax.lax.all_gather(rows, batch_axes, tiled=True)


def reduce_scatter_grad(partial: Callable[..., Array], rows: Sequence[Array], axes: Axes, reduce_dtype: Any) -> Array:
    """Sums `partial(*rows)` of the local rows over all devices, sharded like a weight with `axes`.

    Reduce-scatters over the mesh axes that split both batch and weight, then all-reduces over the other batch axes, the
    outermost (slices) last, when the least data is left.

    Args:
      partial: maps the rows of one device to an array of the weight's global shape.
      rows: arrays whose first dimension is the batch.
      axes: the weight's logical axis names.
      reduce_dtype: dtype of the sums between devices.
    """
    batch_axes = _batch_axes()
    if batch_axes is None:
        return partial(*rows)
    spec = nn.logical_to_mesh_axes(axes)
    scattered = {name: dim for dim, entry in enumerate(spec) for name in _names(entry) if name in batch_axes}

    def reduce_local(*rows):
        total = partial(*rows)
        dtype = total.dtype
        # At some sizes the compiler would make the scattered dimension the minor one. Shards would then be fractions of
        # tiles, and libtpu would sum the whole array on every device.
        major = [*scattered.values(), *(dim for dim in range(total.ndim) if dim not in scattered.values())]
        total = with_layout_constraint(total.astype(reduce_dtype), Layout(tuple(major)))
        for name, dim in scattered.items():
            total = jax.lax.psum_scatter(total, name, scatter_dimension=dim, tiled=True)
        for name in reversed([name for name in batch_axes if name not in scattered]):
            total = jax.lax.psum(total, name)
        return total.astype(dtype)

    out = PartitionSpec(*(tuple(name for name in _names(entry) if name in batch_axes) or None for entry in spec))
    return jax.shard_map(
        reduce_local,
        in_specs=(PartitionSpec(batch_axes),) * len(rows),
        out_specs=out,
        axis_names=set(batch_axes),
        check_vma=False,
    )(*rows)


def _batch_axes() -> tuple[str, ...] | None:
    """Mesh axes of more than one device that split the batch, outermost first; None if there are none."""
    shape = jax.sharding.get_abstract_mesh().shape
    (entry,) = nn.logical_to_mesh_axes(("batch",))
    axes = tuple(name for name in _names(entry) if shape.get(name, 1) > 1)
    return axes or None


def _names(entry: str | Sequence[str] | None) -> tuple[str, ...]:
    return (entry,) if isinstance(entry, str) else tuple(entry or ())
