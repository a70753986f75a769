"""Interconnect cost model: the links that a group of devices uses, and the time of each kind of collective.

A collective over a torus axis uses its ring in both directions; over two axes, both rings. Latency is ignored: the
collectives that matter send megabytes.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from aimv2_jax.parallel.hardware import Chip

Groups = tuple[tuple[int, ...], ...]
NETWORK = "network"  # Link name of the data-centre network.


@dataclasses.dataclass(frozen=True)
class Route:
    """Links that a collective occupies, and for how long."""

    links: frozenset[str]  # Such as "0+" for torus axis 0, upwards, or "network" between slices.
    seconds: float


@dataclasses.dataclass(frozen=True)
class Layout:
    """Positions of the partitions of one slice in the mesh and in the torus."""

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
        return Route(frozenset({NETWORK}), share * num_bytes / self.chip.dcn_bytes_per_s)

    def _is_ring(self, axis: int) -> bool:
        return self.torus[axis] % self.chip.ring_size == 0

    def _group(self, kind: str, num_bytes: int, group: Sequence[int]) -> Route:
        links, rate, hops = set(), 0.0, 0.0
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
        size = len(group)
        # The middle of the longest axis limits an all-to-all: n/8 of the bytes on a ring, n/4 on a line.
        if kind == "all-to-all":
            return Route(frozenset(links), num_bytes * hops / self.chip.link_bytes_per_s)
        times = {"all-gather": 1, "reduce-scatter": 1, "all-reduce": 2, "collective-broadcast": 1}[kind]
        return Route(frozenset(links), times * (size - 1) / size * num_bytes / rate)

    def _permute(self, num_bytes: int, pairs: Groups) -> Route:
        """Returns the route of a permute: messages take the shorter way round, and the longest path counts."""
        links, longest = set(), 0
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
        return Route(frozenset(links), longest * num_bytes / self.chip.link_bytes_per_s)


def layout_of(program: dict[str, Any], chip: Chip, torus: tuple[int, ...]) -> Layout:
    """Builds the layout of one slice from a worker's description of its program (`worker.describe`)."""
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
