"""Collectives of a compiled module: bytes, mesh axes, route, and the instructions that start and finish them.

The compiler writes one collective in several ways: as an operation; as a pair of -start and -done; as fusions named
`async-collective-start` and `-done` with parts of the transfer inside matmul fusions between them (all with one channel
id: one collective); as a fusion `all-reduce-scatter`, which is a reduce-scatter; and between slices as a send to and a
receive from the host, under one rendezvous name.
"""

from __future__ import annotations

import dataclasses
import re
from collections import Counter
from collections.abc import Iterator
from typing import Literal

from aimv2_jax.aot.hlo import Array, Instruction, Module, scheduled
from aimv2_jax.aot.interconnect import Layout, Route, groups_of

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute", "collective-broadcast")
BETWEEN_SLICES = "between slices"


@dataclasses.dataclass(frozen=True)
class Collective:
    """One collective in one execution of its computation."""

    kind: str
    num_bytes: int  # Size of the full array; of one device's message for permute and all-to-all.
    axes: tuple[str, ...]
    route: Route
    asynchronous: bool
    op_name: str
    arrays: tuple[Array, ...]  # On one device, without scalars.


@dataclasses.dataclass(frozen=True)
class CollectiveEvent:
    """One instruction's role in a collective; `sync` starts it and waits for it."""

    role: Literal["sync", "start", "done"]
    key: str
    collective: Collective | None  # None at "done".


class Collectives:
    """Collectives of a module, routed on a device layout."""

    def __init__(self, module: Module, layout: Layout):
        self._module = module
        self._layout = layout
        self._events: dict[str, dict[str, list[CollectiveEvent]]] = {}

    def events(self, computation: str) -> dict[str, list[CollectiveEvent]]:
        """Returns the collective events of a scheduled computation by instruction name."""
        if computation not in self._events:
            self._events[computation] = self._find_events(computation)
        return self._events[computation]

    def all(self) -> Iterator[Collective]:
        """Yields every collective of the scheduled computations once."""
        for computation in dict.fromkeys(item.computation for item in scheduled(self._module)):
            for events in self.events(computation).values():
                yield from (event.collective for event in events if event.collective)

    def _find_events(self, computation: str) -> dict[str, list[CollectiveEvent]]:
        events_by_name: dict[str, list[CollectiveEvent]] = {}
        in_flight: Counter[str] = Counter()
        for instruction in self._module.computations[computation]:
            events = list(self._events_of(instruction, computation, in_flight))
            for event in events:
                in_flight[event.key] += {"start": 1, "done": -1, "sync": 0}[event.role]
            if events:
                events_by_name[instruction.name] = events
        return events_by_name

    def _events_of(
        self, instruction: Instruction, computation: str, in_flight: Counter[str]
    ) -> Iterator[CollectiveEvent]:
        kind = _kind_of(instruction)
        if instruction.opcode in ("send", "recv-done") and "megascale" in instruction.rest:
            yield from self._between_slices(instruction, computation)
        elif kind and instruction.opcode.endswith("-done"):
            yield CollectiveEvent("done", instruction.operands[0], None)
        elif kind:
            asynchronous = instruction.opcode.endswith("-start")
            collective = self._build(instruction, kind, asynchronous, instruction.op_name)
            yield CollectiveEvent("start" if asynchronous else "sync", instruction.name, collective)
        elif instruction.opcode in ("async-done", "async-update"):
            yield from self._async_done(instruction, computation)
        elif instruction.calls:
            yield from self._fused(instruction, in_flight)

    def _fused(self, instruction: Instruction, in_flight: Counter[str]) -> Iterator[CollectiveEvent]:
        """Yields the collectives inside a fusion or an asynchronous wrapper."""
        inner = list(self._collectives_in(instruction.calls))
        if not inner:
            return
        targets = {line.custom_call_target for line in self._module.computations[instruction.calls]}
        wrapped = instruction.opcode == "async-start"
        for operation, kind in inner:
            channel = re.search(r"channel_id=(\d+)", operation.rest)
            key = instruction.name if wrapped else f"{kind} {channel[1] if channel else operation.name}"
            op_name = operation.op_name or instruction.op_name
            if "AsyncCollectiveDone" in targets:
                yield CollectiveEvent("done", key, None)
            elif "AsyncCollectiveStart" in targets or wrapped:
                yield CollectiveEvent("start", key, self._build(operation, kind, True, op_name))
            elif in_flight[key] < 1:
                yield CollectiveEvent("sync", instruction.name, self._build(operation, kind, False, op_name))

    def _collectives_in(self, computation: str) -> Iterator[tuple[Instruction, str]]:
        for instruction in self._module.computations.get(computation, []):
            kind = _kind_of(instruction)
            if kind == "all-reduce" and computation.startswith("all-reduce-scatter"):
                kind = "reduce-scatter"
            if kind:
                yield instruction, kind
            elif instruction.calls:
                yield from self._collectives_in(instruction.calls)

    def _async_done(self, instruction: Instruction, computation: str) -> Iterator[CollectiveEvent]:
        """Yields an async-done if it waits for a collective."""
        named = self._module.named(computation)
        start = instruction
        while start.opcode in ("async-done", "async-update") and start.operands[0] in named:
            start = named[start.operands[0]]
        if instruction.opcode == "async-done" and start.calls and list(self._collectives_in(start.calls)):
            yield CollectiveEvent("done", start.name, None)

    def _between_slices(self, instruction: Instruction, computation: str) -> Iterator[CollectiveEvent]:
        named = self._module.named(computation)
        start = named[instruction.operands[0]] if instruction.opcode == "recv-done" else instruction
        key = re.search(r'_xla_host_transfer_rendezvous="([^"]*)"', start.rest)[1]
        if instruction.opcode == "recv-done":
            yield CollectiveEvent("done", key, None)
            return
        sent = named[instruction.operands[0]]
        kind = re.search(r'_xla_megascale_transfer_type="([^"]*)"', instruction.rest)
        collective = Collective(
            kind=f"{kind[1].lower().replace('_', '-') if kind else 'send'} {BETWEEN_SLICES}",
            num_bytes=sent.num_bytes,
            axes=("slice",),
            route=self._layout.between_slices(sent.num_bytes),
            asynchronous=True,
            op_name=_origin(sent, named),
            arrays=_arrays(sent),
        )
        yield CollectiveEvent("start", key, collective)

    def _build(self, instruction: Instruction, kind: str, asynchronous: bool, op_name: str) -> Collective:
        groups = groups_of(instruction.attributes, self._layout.num_partitions)
        parts = [array for array in instruction.arrays if array.dtype != "token"]
        if instruction.opcode == "collective-permute-start":
            parts = parts[:1]
        elif instruction.opcode == "all-gather-start" or (
            instruction.opcode.endswith("-start") and instruction.shape.startswith("((")
        ):
            parts = parts[len(parts) // 2 :]  # The shape is (inputs, outputs).
        num_bytes = sum(array.bytes for array in parts)
        if kind == "reduce-scatter" and instruction.opcode.startswith("reduce-scatter"):
            num_bytes *= max(map(len, groups))
        axes = self._layout.axes_of(groups, pairs=kind == "collective-permute")
        route = self._layout.route(kind, num_bytes, groups)
        return Collective(kind, num_bytes, axes, route, asynchronous, op_name, _arrays(instruction))


def _kind_of(instruction: Instruction) -> str | None:
    return next((kind for kind in KINDS if instruction.opcode.startswith(kind)), None)


def _arrays(instruction: Instruction) -> tuple[Array, ...]:
    return tuple(array for array in instruction.arrays if array.size > 1)


def _origin(instruction: Instruction, named: dict[str, Instruction]) -> str:
    """Returns the traced name of the operation that produced a value: its own, or its nearest producer's."""
    seen, queue = set(), [instruction]
    while queue:
        nearest = queue.pop(0)
        if nearest.op_name and nearest.opcode != "parameter":
            return nearest.op_name
        seen.add(nearest.name)
        queue += [named[name] for name in nearest.operands if name in named and name not in seen]
    return ""
