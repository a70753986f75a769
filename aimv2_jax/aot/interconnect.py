"""How long the links take: which of them a group of devices can use, and what each kind of collective sends.

A collective over a torus axis uses its ring in both directions; over two axes, both rings. Latency is left out: the
collectives of a step that matter are megabytes.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from aimv2_jax.aot.chips import Chip

Groups = tuple[tuple[int, ...], ...]
NETWORK = "network"  # The link name of the data-centre network.


@dataclasses.dataclass(frozen=True)
class Route:
    """What a collective occupies, and for how long."""

    links: frozenset[str]  # "0+": torus axis 0, upwards; "network": between slices.
    seconds: float


@dataclasses.dataclass(frozen=True)
class Layout:
    """Where the partitions of one slice lie: in the mesh, and in the torus."""

    axes: tuple[str, ...]  # Mesh axes within a slice.
    sizes: tuple[int, ...]
    coords: np.ndarray  # [partitions, torus axes]
    torus: tuple[int, ...]  # Chips along each torus axis.
    num_slices: int
    chip: Chip

    @property
    def num_partitions(self) -> int:
        return math.prod(self.sizes)

    def axes_of(self, groups: Groups, pairs: bool = False) -> tuple[str, ...]:
        """The mesh axes along which the members of a group differ; "part of" where a group is not all of them.

        Of (source, target) `pairs`, just the axes.
        """
        varying: set[int] = set()
        for group in groups:
            places = np.array(np.unravel_index(np.array(group), self.sizes))
            varying |= {axis for axis in range(len(self.sizes)) if len(set(places[axis])) > 1}
        whole = math.prod(self.sizes[axis] for axis in varying)
        part = "" if pairs or all(len(group) == whole for group in groups) else "part of "
        return tuple(part + self.axes[axis] for axis in sorted(varying))

    def route(self, kind: str, num_bytes: int, groups: Groups) -> Route:
        """Links and time of a collective within a slice.

        Args:
          kind: all-gather, reduce-scatter, all-reduce, all-to-all or collective-permute.
          num_bytes: of the whole (gathered, or to be reduced) array; of what one device sends otherwise.
          groups: partitions that talk to each other; (source, target) pairs of a permute.
        """
        if kind == "collective-permute":
            return self._permute(num_bytes, groups)
        routes = [self._group(kind, num_bytes, group) for group in groups if len(group) > 1]
        if not routes:
            return Route(frozenset(), 0.0)
        return Route(frozenset().union(*(one.links for one in routes)), max(one.seconds for one in routes))

    def between_slices(self, num_bytes: int) -> Route:
        """Each chip sends `num_bytes` to be summed with those of the other slices, and receives the sum."""
        share = 2 * (self.num_slices - 1) / self.num_slices
        return Route(frozenset({NETWORK}), share * num_bytes / self.chip.dcn_bytes_per_s)

    def _wrapped(self, axis: int) -> bool:
        return self.torus[axis] % self.chip.ring_size == 0

    def _group(self, kind: str, num_bytes: int, group: Sequence[int]) -> Route:
        links, rate, hops = set(), 0.0, 0.0
        for axis in range(len(self.torus)):
            places = np.unique(self.coords[list(group), axis])
            if len(places) < 2:
                continue
            links |= {f"{axis}+", f"{axis}-"}
            ring = len(places) == self.torus[axis] and self._wrapped(axis)
            # Members that lie apart leave room for other groups, which want the same links.
            apart = 1 if ring else int(np.diff(places).min())
            rate += self.chip.link_bytes_per_s * (2 if ring else 1) / apart
            hops = max(hops, len(places) / (8 if ring else 4))
        size = len(group)
        if (
            kind == "all-to-all"
        ):  # Limited by the middle of the longest axis: n/8 of the bytes on a ring, n/4 on a line.
            return Route(frozenset(links), num_bytes * hops / self.chip.link_bytes_per_s)
        times = {"all-gather": 1, "reduce-scatter": 1, "all-reduce": 2, "collective-broadcast": 1}[kind]
        return Route(frozenset(links), times * (size - 1) / size * num_bytes / rate)

    def _permute(self, num_bytes: int, pairs: Groups) -> Route:
        """A message goes the shorter way round; the longest way counts."""
        links, longest = set(), 0
        for source, target in pairs:
            total = 0
            for axis, size in enumerate(self.torus):
                step = int(self.coords[target, axis] - self.coords[source, axis])
                if self._wrapped(axis) and abs(step) > size / 2:
                    step -= math.copysign(size, step)
                if step:
                    links.add(f"{axis}{'+' if step > 0 else '-'}")
                total += abs(step)
            longest = max(longest, total)
        return Route(frozenset(links), longest * num_bytes / self.chip.link_bytes_per_s)


def layout_of(program: dict[str, Any], chip: Chip, torus: tuple[int, ...]) -> Layout:
    """The layout of one slice, from what a worker says of its program (`worker.describe`)."""
    axes, sizes = program["axes"], program["shape"]
    num_slices = len({device["slice"] for device in program["devices"]})
    inner = [(axis, size) for axis, size in zip(axes, sizes) if not (num_slices > 1 and axis == "slice")]
    per_slice = len(program["devices"]) // num_slices
    coords = np.array([device["coords"] for device in program["devices"][:per_slice]])
    return Layout(
        axes=tuple(axis for axis, _ in inner),
        sizes=tuple(size for _, size in inner),
        coords=coords[:, : len(torus)],
        torus=torus,
        num_slices=num_slices,
        chip=chip,
    )
