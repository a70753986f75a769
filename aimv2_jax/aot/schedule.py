"""Instructions in execution order with trip counts: the entry computation with loop bodies inlined."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator

from aimv2_jax.aot.hlo import Instruction, Module


@dataclasses.dataclass(frozen=True)
class Scheduled:
    """An instruction, its computation, and how often it runs in a step."""

    instruction: Instruction
    computation: str
    times: int


def scheduled(module: Module) -> Iterator[Scheduled]:
    """Yields every top-level instruction in order; instructions inside a fusion are part of the fusion.

    A loop's body is yielded once, with its trip count. The longest branch of a conditional is not known, so the first
    one represents all.
    """
    yield from _walk(module, module.entry, 1)


def _walk(module: Module, computation: str, times: int) -> Iterator[Scheduled]:
    for instruction in module.computations[computation]:
        if instruction.opcode == "while":
            body = re.search(r"body=%?([\w.\-]+)", instruction.rest)
            yield from _walk(module, body[1], times * trip_count(module, instruction))
        elif instruction.opcode == "call":
            yield from _walk(module, re.search(r"to_apply=%?([\w.\-]+)", instruction.rest)[1], times)
        elif instruction.opcode == "conditional":
            branch = re.search(r"(?:branch_computations=\{|true_computation=)%?([\w.\-]+)", instruction.rest)
            yield from _walk(module, branch[1], times)
        else:
            yield Scheduled(instruction, computation, times)


def trip_count(module: Module, loop: Instruction) -> int:
    """Returns how often a loop's body runs.

    Loops that the compiler rewrote lack `known_trip_count`. Their count is the constant in the condition: jax.lax.scan
    counts from 0 by 1.
    """
    known = re.search(r'"?known_trip_count"?:\{"n":"(\d+)"', loop.rest)
    if known:
        return int(known[1])
    condition = re.search(r"condition=%?([\w.\-]+)", loop.rest)
    return max(_constants(module, condition[1], depth=2), default=1)


def _constants(module: Module, computation: str, depth: int) -> Iterator[int]:
    for instruction in module.computations.get(computation, []):
        if instruction.opcode == "constant" and re.match(r"s32\[\]", instruction.shape):
            yield int(re.match(r"\((-?\d+)\)", instruction.rest)[1])
        if instruction.calls and depth:
            yield from _constants(module, instruction.calls, depth - 1)
