"""Which instructions run, in which order and how often: the entry computation, with its loops' bodies in place."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator

from aimv2_jax.aot.hlo import Instruction, Module


@dataclasses.dataclass(frozen=True)
class Scheduled:
    """An instruction, the computation it stands in, and how often it runs in a step."""

    instruction: Instruction
    computation: str
    times: int


def scheduled(module: Module) -> Iterator[Scheduled]:
    """Every instruction that runs on its own, in order; the inside of a fusion is part of the fusion.

    A loop's body comes once, with the number of its trips; of a conditional, the branch that takes longest is not
    known, so its first stands for all.
    """
    yield from _walk(module, module.entry, 1)


def _walk(module: Module, computation: str, times: int) -> Iterator[Scheduled]:
    for one in module.computations[computation]:
        if one.opcode == "while":
            body = re.search(r"body=%?([\w.\-]+)", one.rest)
            yield from _walk(module, body[1], times * trip_count(module, one))
        elif one.opcode == "call":
            yield from _walk(module, re.search(r"to_apply=%?([\w.\-]+)", one.rest)[1], times)
        elif one.opcode == "conditional":
            branch = re.search(r"(?:branch_computations=\{|true_computation=)%?([\w.\-]+)", one.rest)
            yield from _walk(module, branch[1], times)
        else:
            yield Scheduled(one, computation, times)


def trip_count(module: Module, loop: Instruction) -> int:
    """How often a loop's body runs.

    The compiler's own note is missing on loops that it rewrote: there it is the constant that the condition compares
    with, counted from 0 by 1, as every loop of jax.lax.scan is.
    """
    known = re.search(r'"?known_trip_count"?:\{"n":"(\d+)"', loop.rest)
    if known:
        return int(known[1])
    condition = re.search(r"condition=%?([\w.\-]+)", loop.rest)
    return max(_constants(module, condition[1], depth=2), default=1)


def _constants(module: Module, computation: str, depth: int) -> Iterator[int]:
    for one in module.computations.get(computation, []):
        if one.opcode == "constant" and re.match(r"s32\[\]", one.shape):
            yield int(re.match(r"\((-?\d+)\)", one.rest)[1])
        if one.calls and depth:
            yield from _constants(module, one.calls, depth - 1)
