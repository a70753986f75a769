"""Who talks to whom: the ways in which a module writes groups of devices."""

from __future__ import annotations

import math
import re

import numpy as np

from aimv2_jax.aot.interconnect import Groups

_LISTS = re.compile(r"(?:replica_groups|source_target_pairs)=\{((?:\{[\d,]*\},?)*)\}")
_IOTA = re.compile(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?")
_MESH = re.compile(r"replica_groups=mesh\[([^\]]*)\]\s*(?:,?\s*device_ids=\(?\[?([^\])]*)[\])]*)?\s*\{([^}]*)\}")


def groups_of(attributes: str, num_partitions: int) -> Groups:
    """The groups, or pairs, in an instruction's attributes; all devices where none are written.

    Raises:
      ValueError: for a notation that is not known here.
    """
    lists = _LISTS.search(attributes)
    if lists:
        found = [tuple(map(int, one.split(","))) for one in re.findall(r"\{([\d,]+)\}", lists[1])]
        return tuple(found) or (tuple(range(num_partitions)),)
    iota = _IOTA.search(attributes)
    if iota:
        shape, over, turned = ([int(x) for x in part.split(",")] if part else None for part in iota.groups())
        numbers = np.arange(math.prod(over)).reshape(over)
        return _rows(np.transpose(numbers, turned).reshape(shape))
    mesh = _MESH.search(attributes)
    if mesh:
        return _mesh_groups(*mesh.groups())
    if "replica_groups=" in attributes:
        raise ValueError(f"groups in a notation that is not known: {attributes[:200]}")
    return (tuple(range(num_partitions)),)


def _mesh_groups(sizes: str, order: str | None, over: str) -> Groups:
    """mesh['a'=4,'b'=2] {'b'}: a mesh in row-major order, and the axes (or parts of them) that a group spans.

    A part of an axis is written 'a':(BEFORE)SIZE: split into BEFORE x SIZE x the rest, the group spans the middle.
    """
    if order and "<=" in order:
        raise ValueError(f"a mesh with devices in another order is not known: {order}")
    axes = {name: int(size) for name, size in re.findall(r"'([^']+)'=(\d+)", sizes)}
    parts: list[tuple[str, int]] = []
    wanted = {}
    for name, before, size in re.findall(r"'([^']+)'(?::\((\d+)\)(\d+))?", over):
        wanted[name] = (int(before), int(size)) if size else (1, axes[name])
    shape, spanned = [], []
    for name, size in axes.items():
        before, middle = wanted.get(name, (1, 1))
        parts.append((name, size))
        shape += [before, middle, size // (before * middle)]
        spanned.append(len(shape) - 2)
    numbers = np.array([int(x) for x in re.findall(r"\d+", order)]) if order else np.arange(math.prod(shape))
    numbers = numbers.reshape(shape)
    kept = [axis for axis in range(len(shape)) if axis not in spanned]
    turned = np.transpose(numbers, kept + spanned)
    return _rows(turned.reshape(-1, math.prod(shape[axis] for axis in spanned)))


def _rows(array: np.ndarray) -> Groups:
    return tuple(tuple(int(number) for number in row) for row in array.reshape(-1, array.shape[-1]))
