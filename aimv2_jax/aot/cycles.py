"""What each scheduled instruction takes, in the compiler's cycles, and where the figure comes from."""

from __future__ import annotations

import dataclasses
import enum
import math
from typing import Protocol

from aimv2_jax.aot.chips import Chip
from aimv2_jax.aot.collectives import Collectives
from aimv2_jax.aot.fingerprint import Fingerprints
from aimv2_jax.aot.hlo import Instruction, Module
from aimv2_jax.aot.kernels import FREE_OPCODES, is_free, moved_bytes, rule_cycles
from aimv2_jax.aot.schedule import scheduled


class Source(enum.StrEnum):
    """Where a figure comes from, from the surest to the least."""

    COMPILER = "the compiler's own figure"
    TWIN = "the same fusion in the shallow twin"
    TWIN_ELSEWHERE = "the same fusion in the shallow twin, operands in another memory"
    TWIN_SCALED = "the same fusion over a shallower stack, scaled by bytes"
    KERNEL = "the rule for kernels without a figure"
    BYTES = "no such fusion in the twin: its bytes by the rule for kernels, and what an instruction takes at least"
    NOTHING = "takes no time of its own"


@dataclasses.dataclass(frozen=True)
class Charge:
    """Cycles of one run of an instruction."""

    cycles: float
    source: Source


class Charges(Protocol):
    """Something that knows the cycles of a module's scheduled instructions."""

    def of(self, one: Instruction, computation: str) -> Charge: ...


class OwnCharges:
    """Of a module after code generation: its own figures, and the rule where it has none."""

    def __init__(self, module: Module, collectives: Collectives, chip: Chip):
        self._module, self._collectives, self._chip = module, collectives, chip

    def of(self, one: Instruction, computation: str) -> Charge:
        if one.estimated_cycles is not None:
            return Charge(one.estimated_cycles, Source.COMPILER)
        if is_free(one) or self._talks(one, computation):
            return Charge(0, Source.NOTHING)
        return Charge(rule_cycles(one, computation, self._module, self._chip), Source.KERNEL)

    def _talks(self, one: Instruction, computation: str) -> bool:
        return one.name in self._collectives.marks(computation)


class TwinCharges:
    """Of a module before code generation: the figures of a twin that has it behind it.

    Fusions are found by what they compute (`fingerprint`). What touches whole stacks of layers has no equal in a
    twin with fewer layers: it is found without the stack's size and scaled by its bytes, or charged by the rule.
    """

    def __init__(self, module: Module, charges: OwnCharges, chip: Chip, twin: Module, depths: frozenset[int]):
        self._module, self._rule, self._chip = module, charges, chip
        self._prints = Fingerprints(module, depths)
        twin_prints = Fingerprints(twin, depths)
        self._charged: dict[tuple[str, str], Charge] = {}
        self._exact: dict[str, int] = {}
        self._without: set[str] = set()  # What the twin has, too, and without a figure.
        self._anywhere: dict[str, list[tuple[str, int]]] = {}
        self._stacked: dict[str, tuple[int, int]] = {}
        least = [math.inf]  # Of what reads or writes HBM: the latency of a transfer.
        for each in scheduled(twin):
            one = each.instruction
            print_ = twin_prints.of(one, each.computation)
            if one.estimated_cycles is None:
                self._without.add(print_.anywhere)
                continue
            if "H" in print_.places.partition(">")[2]:
                least.append(one.estimated_cycles)
            self._exact[print_.exact] = one.estimated_cycles
            self._anywhere.setdefault(print_.anywhere, []).append((print_.places, one.estimated_cycles))
            self._stacked[print_.stacked] = (one.estimated_cycles, moved_bytes(one, each.computation, twin))
        self._least = min(least) if len(least) > 1 else 0

    def of(self, one: Instruction, computation: str) -> Charge:
        key = (computation, one.name)
        if key not in self._charged:
            self._charged[key] = self._look_up(one, computation)
        return self._charged[key]

    def _look_up(self, one: Instruction, computation: str) -> Charge:
        rule = self._rule.of(one, computation)
        if one.opcode in FREE_OPCODES or one.opcode == "custom-call" or one.opcode.endswith(("-start", "-done")):
            return rule
        print_ = self._prints.of(one, computation)
        if print_.exact in self._exact:
            return Charge(self._exact[print_.exact], Source.TWIN)
        if print_.anywhere in self._anywhere:
            return Charge(_nearest(self._anywhere[print_.anywhere], print_.places), Source.TWIN_ELSEWHERE)
        if print_.stacked in self._stacked:
            cycles, num_bytes = self._stacked[print_.stacked]
            ratio = moved_bytes(one, computation, self._module) / max(num_bytes, 1)
            return Charge(cycles * ratio, Source.TWIN_SCALED)
        if rule.source is Source.KERNEL and print_.anywhere not in self._without:
            return Charge(rule.cycles + self._least, Source.BYTES)
        return rule


def _nearest(known: list[tuple[str, int]], places: str) -> float:
    """The figure of the twin's fusion with the fewest operands and results in another memory; their mean on a tie."""
    distances = [sum(a != b for a, b in zip(where, places)) for where, _ in known]
    nearest = [cycles for distance, (_, cycles) in zip(distances, known) if distance == min(distances)]
    return sum(nearest) / len(nearest)
