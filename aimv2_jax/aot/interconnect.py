"""Interconnect cost model: groups of devices, the links that a group uses, and the time of each kind of collective.

A collective over a torus axis uses its ring in both directions; over two axes, both rings. Latency is ignored: the
collectives that matter send megabytes.

Where a chip is two devices (v7x), the two share the chip's links: a group with one device of each chip has half of
them, a group with both has all of them, and moves what its chips exchange inside over their faster connection.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Sequence

import numpy as np

from aimv2_jax.aot.program import ProgramFacts
from aimv2_jax.aot.topology import Topology
from aimv2_jax.parallel.hardware import Chip

Groups = tuple[tuple[int, ...], ...]
_DIE = "die"  # The connection between the two devices of a chip.
_LISTS = re.compile(r"(?:replica_groups|source_target_pairs)=\{((?:\{[\d,]*\},?)*)\}")
_IOTA = re.compile(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?")
_MESH = re.compile(r"replica_groups=mesh\[([^\]]*)\]\s*(?:,?\s*device_ids=\(?\[?([^\])]*)[\])]*)?\s*\{([^}]*)\}")


@dataclasses.dataclass(frozen=True)
class Route:
    """Links that a collective occupies, and for how long."""

    links: frozenset[str]  # Such as "0+" for torus axis 0, upwards, "die" in a chip, or "network" between slices.
    seconds: float


@dataclasses.dataclass(frozen=True)
class Layout:
    """Positions of the partitions of one slice in the mesh and in the torus."""

    axes: tuple[str, ...]  # Mesh axes within a slice.
    sizes: tuple[int, ...]
    coords: np.ndarray  # [partitions, torus axes]; with several devices a chip, one more column for the place in it.
    torus: tuple[int, ...]  # Chips along each torus axis.
    num_slices: int
    chip: Chip

    @property
    def num_partitions(self) -> int:
        return math.prod(self.sizes)

    def axes_of(self, groups: Groups, pairs: bool = False) -> tuple[str, ...]:
        """Returns the mesh axes that a group spans, prefixed with "part of" if it does not span them fully.

        For (source, target) `pairs`, the prefix is omitted.
        """
        varying: set[int] = set()
        for group in groups:
            indices = np.array(np.unravel_index(np.array(group), self.sizes))
            varying |= {axis for axis in range(len(self.sizes)) if len(set(indices[axis])) > 1}
        whole = math.prod(self.sizes[axis] for axis in varying)
        part = "" if pairs or all(len(group) == whole for group in groups) else "part of "
        return tuple(part + self.axes[axis] for axis in sorted(varying))

    def route(self, kind: str, num_bytes: int, groups: Groups) -> Route:
        """Returns the links and the time of a collective within a slice.

        Args:
          kind: all-gather, reduce-scatter, all-reduce, all-to-all or collective-permute.
          num_bytes: size of the full (gathered or unreduced) array; otherwise, of one device's message.
          groups: replica groups; (source, target) pairs of a permute.
        """
        if kind == "collective-permute":
            return self._permute(num_bytes, groups)
        routes = [self._group(kind, num_bytes, group) for group in groups if len(group) > 1]
        if not routes:
            return Route(frozenset(), 0.0)
        return Route(frozenset().union(*(route.links for route in routes)), max(route.seconds for route in routes))

    def between_slices(self, num_bytes: int) -> Route:
        """Returns the route of an all-reduce of `num_bytes` a chip over the slices."""
        share = 2 * (self.num_slices - 1) / self.num_slices
        return Route(frozenset({"network"}), share * num_bytes / self.chip.dcn_bytes_per_s)

    def _is_ring(self, axis: int) -> bool:
        return self.torus[axis] % self.chip.ring_size == 0

    def _devices_of_chips(self, group: Sequence[int]) -> int:
        """Number of devices that a group has of each of its chips."""
        return len(np.unique(self.coords[list(group), len(self.torus) :], axis=0)) if self.chip.devices > 1 else 1

    def _group(self, kind: str, num_bytes: int, group: Sequence[int]) -> Route:
        links, rate, hops = set(), 0.0, 0.0
        inside = self._devices_of_chips(group)
        for axis in range(len(self.torus)):
            positions = np.unique(self.coords[list(group), axis])
            if len(positions) < 2:
                continue
            links |= {f"{axis}+", f"{axis}-"}
            ring = len(positions) == self.torus[axis] and self._is_ring(axis)
            # Groups with a stride interleave and share the same links.
            stride = 1 if ring else int(np.diff(positions).min())
            rate += self.chip.link_bytes_per_s * (2 if ring else 1) / stride
            hops = max(hops, len(positions) / (8 if ring else 4))
        if inside > 1:
            links.add(_DIE)
        rate = rate * inside / self.chip.devices or self.chip.die_bytes_per_s
        size = len(group)
        # The middle of the longest axis limits an all-to-all: n/8 of the bytes on a ring, n/4 on a line.
        if kind == "all-to-all":
            link_rate = self.chip.link_bytes_per_s / self.chip.devices if hops else self.chip.die_bytes_per_s
            return Route(frozenset(links), num_bytes * (hops or 1 / 2) / link_rate)
        times = {"all-gather": 1, "reduce-scatter": 1, "all-reduce": 2, "collective-broadcast": 1}[kind]
        return Route(frozenset(links), times * (size - 1) / size * num_bytes / rate)

    def _permute(self, num_bytes: int, pairs: Groups) -> Route:
        """Returns the route of a permute: messages take the shorter way round, and the longest path counts."""
        links, longest, inside = set(), 0, False
        for source, target in pairs:
            total = 0
            for axis, size in enumerate(self.torus):
                step = int(self.coords[target, axis] - self.coords[source, axis])
                if self._is_ring(axis) and abs(step) > size / 2:
                    step -= math.copysign(size, step)
                if step:
                    links.add(f"{axis}{'+' if step > 0 else '-'}")
                total += abs(step)
            longest = max(longest, total)
            inside |= self._devices_of_chips((source, target)) > 1
        seconds = longest * num_bytes * self.chip.devices / self.chip.link_bytes_per_s
        if inside:
            links.add(_DIE)
            seconds += num_bytes / self.chip.die_bytes_per_s
        return Route(frozenset(links), seconds)


def layout_of(facts: ProgramFacts, topology: Topology) -> Layout:
    """Builds the layout of one slice of a program's mesh."""
    inner = {axis: size for axis, size in facts.mesh.items() if topology.slices == 1 or axis != "slice"}
    coords = np.array(facts.coords[: len(facts.coords) // topology.slices])
    return Layout(
        axes=tuple(inner),
        sizes=tuple(inner.values()),
        coords=coords[:, [*range(len(topology.shape)), *([-1] if topology.chip.devices > 1 else [])]],
        torus=topology.shape,
        num_slices=topology.slices,
        chip=topology.chip,
    )


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

    In a part 'a':(BEFORE)SIZE, the axis splits into BEFORE x SIZE x the rest, and the group spans the middle factor.
    """
    if order and "<=" in order:
        raise ValueError(f"the device order of the mesh is not known: {order}")
    axes = {name: int(size) for name, size in re.findall(r"'([^']+)'=(\d+)", sizes)}
    spans = {}
    for name, before, size in re.findall(r"'([^']+)'(?::\((\d+)\)(\d+))?", over):
        spans[name] = (int(before), int(size)) if size else (1, axes[name])
    shape, spanned = [], []
    for name, size in axes.items():
        before, middle = spans.get(name, (1, 1))
        shape += [before, middle, size // (before * middle)]
        spanned.append(len(shape) - 2)
    numbers = np.array([int(x) for x in re.findall(r"\d+", order)]) if order else np.arange(math.prod(shape))
    numbers = numbers.reshape(shape)
    kept = [axis for axis in range(len(shape)) if axis not in spanned]
    transposed = np.transpose(numbers, kept + spanned)
    return _to_groups(transposed.reshape(-1, math.prod(shape[axis] for axis in spanned)))


def _to_groups(array: np.ndarray) -> Groups:
    return tuple(tuple(int(number) for number in row) for row in array.reshape(-1, array.shape[-1]))
