"""Replica groups, parsed from every notation that a compiled module uses."""

from __future__ import annotations

import math
import re

import numpy as np

from aimv2_jax.aot.interconnect import Groups

_LISTS = re.compile(r"(?:replica_groups|source_target_pairs)=\{((?:\{[\d,]*\},?)*)\}")
_IOTA = re.compile(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?")
_MESH = re.compile(r"replica_groups=mesh\[([^\]]*)\]\s*(?:,?\s*device_ids=\(?\[?([^\])]*)[\])]*)?\s*\{([^}]*)\}")


def groups_of(attributes: str, num_partitions: int) -> Groups:
    """Returns an instruction's replica groups or source-target pairs; one group of all devices if it has none.

    Raises:
      ValueError: for an unknown notation.
    """
    lists = _LISTS.search(attributes)
    if lists:
        groups = [tuple(map(int, group.split(","))) for group in re.findall(r"\{([\d,]+)\}", lists[1])]
        return tuple(groups) or (tuple(range(num_partitions)),)
    iota = _IOTA.search(attributes)
    if iota:
        shape, dims, permutation = ([int(x) for x in part.split(",")] if part else None for part in iota.groups())
        numbers = np.arange(math.prod(dims)).reshape(dims)
        return _to_groups(np.transpose(numbers, permutation).reshape(shape))
    mesh = _MESH.search(attributes)
    if mesh:
        return _mesh_groups(*mesh.groups())
    if "replica_groups=" in attributes:
        raise ValueError(f"the notation of the replica groups is not known: {attributes[:200]}")
    return (tuple(range(num_partitions)),)


def _mesh_groups(sizes: str, order: str | None, over: str) -> Groups:
    """Parses mesh['a'=4,'b'=2] {'b'}: a mesh in row-major order, and the axes (or parts of them) that a group spans.

    A part of an axis is written 'a':(BEFORE)SIZE: the axis splits into BEFORE x SIZE x the rest, and the group spans
    the middle factor.
    """
    if order and "<=" in order:
        raise ValueError(f"the device order of the mesh is not known: {order}")
    axes = {name: int(size) for name, size in re.findall(r"'([^']+)'=(\d+)", sizes)}
    parts: list[tuple[str, int]] = []
    spans = {}
    for name, before, size in re.findall(r"'([^']+)'(?::\((\d+)\)(\d+))?", over):
        spans[name] = (int(before), int(size)) if size else (1, axes[name])
    shape, spanned = [], []
    for name, size in axes.items():
        before, middle = spans.get(name, (1, 1))
        parts.append((name, size))
        shape += [before, middle, size // (before * middle)]
        spanned.append(len(shape) - 2)
    numbers = np.array([int(x) for x in re.findall(r"\d+", order)]) if order else np.arange(math.prod(shape))
    numbers = numbers.reshape(shape)
    kept = [axis for axis in range(len(shape)) if axis not in spanned]
    transposed = np.transpose(numbers, kept + spanned)
    return _to_groups(transposed.reshape(-1, math.prod(shape[axis] for axis in spanned)))


def _to_groups(array: np.ndarray) -> Groups:
    return tuple(tuple(int(number) for number in row) for row in array.reshape(-1, array.shape[-1]))
