"""Which instructions talk to other devices: what they send, over which mesh axes, and where they begin and end.

The compiler writes one collective in several ways: as an operation; as a pair of -start and -done; as fusions named
`async-collective-start` and `-done`, between which pieces travel inside matmul fusions (all with one channel id: one
collective); as a fusion `all-reduce-scatter`, which is a reduce-scatter; and between slices as a send to and a receive
from the host, under one rendezvous name.
"""

from __future__ import annotations

import dataclasses
import re
from collections import Counter
from collections.abc import Iterator
from typing import Literal

from aimv2_jax.aot.groups import groups_of
from aimv2_jax.aot.hlo import Instruction, Module, arrays
from aimv2_jax.aot.interconnect import Layout, Route

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute", "collective-broadcast")
BETWEEN_SLICES = "between slices"


@dataclasses.dataclass(frozen=True)
class Collective:
    """One collective of one run of its computation."""

    kind: str
    num_bytes: int  # Of the whole array; what a device sends where the kind has no whole.
    axes: tuple[str, ...]
    route: Route
    asynchronous: bool
    op_name: str
    arrays: tuple[str, ...]  # "f32[1024,2816]", as one device has them.


@dataclasses.dataclass(frozen=True)
class Mark:
    """What an instruction does to a collective. `whole`: begins it and waits for it."""

    role: Literal["whole", "start", "done"]
    key: str
    collective: Collective | None  # None at "done".


class Collectives:
    """The collectives of a module on a layout."""

    def __init__(self, module: Module, layout: Layout):
        self._module, self._layout = module, layout
        self._marks: dict[str, dict[str, list[Mark]]] = {}

    def marks(self, computation: str) -> dict[str, list[Mark]]:
        """By instruction name, what the instructions of a scheduled computation do."""
        if computation not in self._marks:
            self._marks[computation] = self._read_all(computation)
        return self._marks[computation]

    def _read_all(self, computation: str) -> dict[str, list[Mark]]:
        found: dict[str, list[Mark]] = {}
        in_flight: Counter[str] = Counter()
        for one in self._module.computations[computation]:
            marks = list(self._read(one, computation, in_flight))
            for mark in marks:
                in_flight[mark.key] += {"start": 1, "done": -1, "whole": 0}[mark.role]
            if marks:
                found[one.name] = marks
        return found

    def _read(self, one: Instruction, computation: str, in_flight: Counter[str]) -> Iterator[Mark]:
        kind = next((kind for kind in KINDS if one.opcode.startswith(kind)), None)
        if one.opcode in ("send", "recv-done") and "megascale" in one.rest:
            yield from self._between_slices(one, computation)
        elif kind and one.opcode.endswith("-done"):
            yield Mark("done", one.operands[0], None)
        elif kind:
            asynchronous = one.opcode.endswith("-start")
            yield Mark(
                "start" if asynchronous else "whole", one.name, self._build(one, kind, asynchronous, one.op_name)
            )
        elif one.opcode in ("async-done", "async-update"):
            yield from self._async(one, computation)
        elif one.calls:
            yield from self._called(one, in_flight)

    def _called(self, one: Instruction, in_flight: Counter[str]) -> Iterator[Mark]:
        """Collectives inside a fusion or an asynchronous wrapper."""
        inner = list(self._inside(one.calls))
        if not inner:
            return
        targets = {
            match[1]
            for line in self._module.computations[one.calls]
            if (match := re.search(r'custom_call_target="(\w+)"', line.rest))
        }
        for operation, kind in inner:
            channel = re.search(r"channel_id=(\d+)", operation.rest)
            key = one.name if one.opcode == "async-start" else f"{kind} {channel[1] if channel else operation.name}"
            op_name = operation.op_name or one.op_name
            if "AsyncCollectiveDone" in targets:
                yield Mark("done", key, None)
            elif "AsyncCollectiveStart" in targets or one.opcode == "async-start":
                yield Mark("start", key, self._build(operation, kind, True, op_name))
            elif in_flight[key] < 1:
                yield Mark("whole", one.name, self._build(operation, kind, False, op_name))

    def _inside(self, computation: str) -> Iterator[tuple[Instruction, str]]:
        for one in self._module.computations.get(computation, []):
            kind = next((kind for kind in KINDS if one.opcode.startswith(kind)), None)
            if kind == "all-reduce" and computation.startswith("all-reduce-scatter"):
                kind = "reduce-scatter"
            if kind:
                yield one, kind
            elif one.calls:
                yield from self._inside(one.calls)

    def _async(self, one: Instruction, computation: str) -> Iterator[Mark]:
        """An async-done, if what it waits for is a collective."""
        named = self._module.named(computation)
        start = one
        while start.opcode in ("async-done", "async-update") and start.operands[0] in named:
            start = named[start.operands[0]]
        if one.opcode == "async-done" and start.calls and list(self._inside(start.calls)):
            yield Mark("done", start.name, None)

    def _between_slices(self, one: Instruction, computation: str) -> Iterator[Mark]:
        named = self._module.named(computation)
        start = named[one.operands[0]] if one.opcode == "recv-done" else one
        key = re.search(r'_xla_host_transfer_rendezvous="([^"]*)"', start.rest)[1]
        if one.opcode == "recv-done":
            yield Mark("done", key, None)
            return
        sent = named[one.operands[0]]
        kind = re.search(r'_xla_megascale_transfer_type="([^"]*)"', one.rest)
        num_bytes = sum(array.bytes for array in arrays(sent.shape))
        collective = Collective(
            kind=f"{kind[1].lower().replace('_', '-') if kind else 'send'} {BETWEEN_SLICES}",
            num_bytes=num_bytes,
            axes=("slice",),
            route=self._layout.between_slices(num_bytes),
            asynchronous=True,
            op_name=_origin(sent, named),
            arrays=_shown(sent),
        )
        yield Mark("start", key, collective)

    def _build(self, one: Instruction, kind: str, asynchronous: bool, op_name: str) -> Collective:
        groups = groups_of(one.attributes, self._layout.num_partitions)
        parts = [array for array in one.arrays if array.dtype != "token"]
        if one.opcode == "collective-permute-start":
            parts = parts[:1]
        elif one.opcode == "all-gather-start" or (one.opcode.endswith("-start") and one.shape.startswith("((")):
            parts = parts[len(parts) // 2 :]  # (what goes in, what comes out)
        num_bytes = sum(array.bytes for array in parts)
        if kind == "reduce-scatter" and one.opcode.startswith("reduce-scatter"):
            num_bytes *= max(map(len, groups))
        axes = self._layout.axes_of(groups, pairs=kind == "collective-permute")
        return Collective(
            kind, num_bytes, axes, self._layout.route(kind, num_bytes, groups), asynchronous, op_name, _shown(one)
        )


def _shown(one: Instruction) -> tuple[str, ...]:
    return tuple(f"{array.dtype}[{','.join(map(str, array.dims))}]" for array in one.arrays if array.size > 1)


def _origin(one: Instruction, named: dict[str, Instruction]) -> str:
    """The name in the traced program of what made a value: its own, or that of the nearest before it."""
    seen, ahead = set(), [one]
    while ahead:
        nearest = ahead.pop(0)
        if nearest.op_name and nearest.opcode != "parameter":
            return nearest.op_name
        seen.add(nearest.name)
        ahead += [named[name] for name in nearest.operands if name in named and name not in seen]
    return ""
