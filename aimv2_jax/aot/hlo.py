"""Compiled modules, parsed from the compiler's text, and their instructions in execution order.

The text is the only form that the compiler writes before code generation. After code generation it has the same form,
with `estimated_cycles` added.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterator
from functools import cached_property

# Bits of an element; other types count as 32.
_BITS = {"pred": 8, "s4": 4, "u4": 4, "s8": 8, "u8": 8, "s16": 16, "u16": 16, "bf16": 16, "f16": 16}
_BITS |= {"s32": 32, "u32": 32, "f32": 32, "s64": 64, "u64": 64, "f64": 64, "token": 0}
_ARRAY = re.compile(r"\b(pred|token|bf16|[suf]\d+(?:e\dm\d\w*)?)\[([\d,]*)\](?:\{([^{}]*)\})?")
_HEAD = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*-> .*\{$")
_INSTRUCTION = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = (.*)$")
_OPCODE = re.compile(r"([a-z][\w\-]*)\(")
_CALLS = re.compile(r"\bcalls=%?([\w.\-]+)")
# The computation that an instruction runs. The longest branch of a conditional is not known: the first represents all.
_BODIES = {
    "while": re.compile(r"body=%?([\w.\-]+)"),
    "call": re.compile(r"to_apply=%?([\w.\-]+)"),
    "conditional": re.compile(r"(?:branch_computations=\{|true_computation=)%?([\w.\-]+)"),
}


@dataclasses.dataclass(frozen=True)
class Array:
    """Type, sizes and layout of one array."""

    dtype: str
    dims: tuple[int, ...]
    layout: str = ""  # Minor to major, tiles, memory space: "1,0:T(8,128)(2,1)S(1)".

    @property
    def size(self) -> int:
        return math.prod(self.dims)

    @property
    def bytes(self) -> int:
        return self.size * _BITS.get(self.dtype, 32) // 8

    def __str__(self) -> str:
        return f"{self.dtype}[{','.join(map(str, self.dims))}]"


def arrays(text: str) -> list[Array]:
    """Parses every array in the text of a shape, with tuples flattened."""
    return [
        Array(dtype, tuple(int(size) for size in dims.split(",") if size), layout or "")
        for dtype, dims, layout in _ARRAY.findall(text)
    ]


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line of the text: %name = shape opcode(operands), attributes."""

    name: str
    shape: str
    opcode: str
    rest: str  # The text after the opcode: "(operands), attributes".
    root: bool

    @cached_property
    def arrays(self) -> list[Array]:
        return arrays(self.shape)

    @cached_property
    def num_bytes(self) -> int:
        """Size of the result."""
        return sum(array.bytes for array in self.arrays)

    @cached_property
    def operands(self) -> list[str]:
        return re.findall(r"%([\w.\-]+(?:#\d+)?)", self.rest[: _closing(self.rest)])

    @cached_property
    def attributes(self) -> str:
        return self.rest[_closing(self.rest) :]

    @cached_property
    def op_name(self) -> str:
        """Traced name of the operation; empty if the compiler created the instruction."""
        match = re.search(r'op_name="((?:[^"\\]|\\.)*)"', self.rest)
        return match[1].replace("\\'", "'") if match else ""

    @property
    def stem(self) -> str:
        """The name without the number that makes it unique."""
        return re.sub(r"[.\d]+$", "", self.name)

    @property
    def custom_call_target(self) -> str:
        """The target of a custom call, "" for other instructions."""
        match = re.search(r'custom_call_target="([^"]*)"', self.rest)
        return match[1] if match else ""

    @cached_property
    def calls(self) -> str | None:
        """The computation that a fusion or an asynchronous wrapper runs."""
        match = _CALLS.search(self.rest)
        return match[1] if match else None

    @cached_property
    def estimated_cycles(self) -> float | None:
        """The compiler's cycle estimate, present only after code generation."""
        match = re.search(r'"estimated_cycles":"(\d+)"', self.rest)
        return float(match[1]) if match else None


@dataclasses.dataclass(frozen=True)
class Module:
    """Computations by name, in the order of the text; scheduled computations list instructions in execution order."""

    computations: dict[str, list[Instruction]]
    entry: str
    _by_name: dict[str, dict[str, Instruction]] = dataclasses.field(default_factory=dict, repr=False)

    @property
    def entry_parameters(self) -> list[Instruction]:
        return [line for line in self.computations[self.entry] if line.opcode == "parameter"]

    def root(self, computation: str) -> Instruction:
        """Returns the instruction whose result is the computation's."""
        return next(line for line in self.computations[computation] if line.root)

    def named(self, computation: str) -> dict[str, Instruction]:
        """Returns the instructions of a computation by name."""
        if computation not in self._by_name:
            self._by_name[computation] = {line.name: line for line in self.computations[computation]}
        return self._by_name[computation]


def parse_module(text: str) -> Module:
    """Parses the compiler's text of a module.

    The dumps of jax 0.12 write `%tuple#1` for a get-tuple-element; the parser inserts that instruction.
    """
    computations: dict[str, list[Instruction]] = {}
    named: dict[str, Instruction] = {}  # Instructions of the current computation.
    entry, current = "", None
    for line in _join_lines(text):
        head = _HEAD.match(line)
        if head:
            current, named = computations.setdefault(head[2], []), {}
            entry = head[2] if head[1] else entry
            continue
        match = _INSTRUCTION.match(line)
        if match and current is not None:
            shape, rest = _split_shape(match[3])
            opcode = _OPCODE.match(rest)
            if opcode:
                instruction = Instruction(match[2], shape, opcode[1], rest[len(opcode[1]) :], bool(match[1]))
                missing = [name for name in instruction.operands if "#" in name and name not in named]
                added = [*(_element(name, named) for name in missing), instruction]
                current += added
                named |= {item.name: item for item in added}
    return Module(computations, entry)


def _element(name: str, named: dict[str, Instruction]) -> Instruction:
    """Builds the get-tuple-element that `TUPLE#NUMBER` abbreviates."""
    tuple_name, _, number = name.partition("#")
    shape = _split_tuple(named[tuple_name].shape)[int(number)]
    return Instruction(name, shape, "get-tuple-element", f"(%{tuple_name}), index={number}", False)


def _split_tuple(shape: str) -> list[str]:
    """Splits a tuple's shape into the shapes of its elements."""
    elements, depth = [""], 0
    for letter in re.sub(r"/\*.*?\*/", "", shape[1:-1]):
        depth += (letter in "([{") - (letter in ")]}")
        if letter == "," and depth == 0:
            elements.append("")
        else:
            elements[-1] += letter
    return [element.strip() for element in elements]


def _join_lines(text: str) -> Iterator[str]:
    """Yields lines, and joins those that a kernel's metadata splits."""
    pending = ""
    for line in text.splitlines():
        starts = line == "}" or line.startswith(("%", "ENTRY")) or _INSTRUCTION.match(line)
        if starts:
            if pending:
                yield pending
            pending = line
        elif pending and line:
            pending += line
    if pending:
        yield pending


def _split_shape(text: str) -> tuple[str, str]:
    """Splits "shape opcode(...)" in two; a tuple's shape nests."""
    end = _closing(text) if text.startswith("(") else len(text.partition(" ")[0])
    return text[:end], text[end + 1 :]


def _closing(text: str) -> int:
    """Returns the length of the parenthesised text at the start."""
    depth = 0
    for index, letter in enumerate(text):
        depth += (letter == "(") - (letter == ")")
        if depth == 0:
            return index + 1
    return len(text)


@dataclasses.dataclass(frozen=True)
class Scheduled:
    """An instruction, its computation, and how often it runs in a step."""

    instruction: Instruction
    computation: str
    times: int


def scheduled(module: Module) -> Iterator[Scheduled]:
    """Yields every top-level instruction in execution order, a loop's body once with its trip count.

    Instructions inside a fusion are part of the fusion.
    """
    yield from _walk(module, module.entry, 1)


def _walk(module: Module, computation: str, times: int) -> Iterator[Scheduled]:
    for instruction in module.computations[computation]:
        if body := body_of(module, instruction):
            yield from _walk(module, body[0], times * body[1])
        else:
            yield Scheduled(instruction, computation, times)


def body_of(module: Module, instruction: Instruction) -> tuple[str, int] | None:
    """Returns the computation that a loop, call or conditional runs, and how often; None for other instructions."""
    if instruction.opcode not in _BODIES:
        return None
    body = _BODIES[instruction.opcode].search(instruction.rest)[1]
    return body, trip_count(module, instruction) if instruction.opcode == "while" else 1


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
