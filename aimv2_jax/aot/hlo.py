"""Parser for the text of a compiled module: computations of instructions.

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
    def operands(self) -> list[str]:
        return re.findall(r"%([\w.\-]+(?:#\d+)?)", self._parenthesised)

    @cached_property
    def _parenthesised(self) -> str:
        depth = 0
        for index, letter in enumerate(self.rest):
            depth += (letter == "(") - (letter == ")")
            if depth == 0:
                return self.rest[: index + 1]
        return self.rest

    @cached_property
    def attributes(self) -> str:
        return self.rest[len(self._parenthesised) :]

    @cached_property
    def op_name(self) -> str:
        """Traced name of the operation; empty if the compiler created the instruction."""
        match = re.search(r'op_name="((?:[^"\\]|\\.)*)"', self.rest)
        return match[1].replace("\\'", "'") if match else ""

    @cached_property
    def calls(self) -> str | None:
        """The computation that a fusion or an asynchronous wrapper runs."""
        match = _CALLS.search(self.rest)
        return match[1] if match else None

    @cached_property
    def estimated_cycles(self) -> int | None:
        """The compiler's cycle estimate, present only after code generation."""
        match = re.search(r'"estimated_cycles":"(\d+)"', self.rest)
        return int(match[1]) if match else None


@dataclasses.dataclass(frozen=True)
class Module:
    """Computations by name, in the order of the text; scheduled computations list instructions in execution order."""

    computations: dict[str, list[Instruction]]
    entry: str
    _by_name: dict[str, dict[str, Instruction]] = dataclasses.field(default_factory=dict, repr=False)

    @property
    def entry_parameters(self) -> list[Instruction]:
        return [line for line in self.computations[self.entry] if line.opcode == "parameter"]

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
    if not text.startswith("("):
        shape, _, rest = text.partition(" ")
        return shape, rest
    depth = 0
    for index, letter in enumerate(text):
        depth += (letter == "(") - (letter == ")")
        if depth == 0:
            return text[: index + 1], text[index + 2 :]
    return text, ""
