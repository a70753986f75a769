"""Name-independent fingerprints of scheduled instructions: equal fingerprints take equal cycles.

The fused computation is traversed from its results backwards, so names and the order of lines do not matter; shapes,
layouts, attributes and constants do. Parameters are numbered in traversal order. Values that only pass through are left
out: the buffers of an asynchronous collective that the compiler fused into a matmul.
"""

from __future__ import annotations

import dataclasses
import hashlib
import re

from aimv2_jax.aot.collectives import KINDS
from aimv2_jax.aot.hlo import Instruction, Module

# Attributes with the origin or the communication peers of an instruction, which do not affect its computation.
_IGNORED_ATTRIBUTES = re.compile(
    r',? ?(?:metadata=\{(?:[^{}"]|"(?:[^"\\]|\\.)*")*\}|backend_config=.*$|frontend_attributes=\{[^{}]*\}'
    r"|sharding=\{[^{}]*\}|channel_id=\d+|output_to_operand_aliasing=\{.*?\}(?=, [a-z])|calls=%?[\w.\-]+"
    r"|to_apply=%?[\w.\-]+|/\*[^*]*\*/)"
)
_SPACE = re.compile(r"S\(\d+\)")
_CALLED = re.compile(r"(?:calls|to_apply)=%?([\w.\-]+)")
_VMEM = "S(1)"


@dataclasses.dataclass(frozen=True)
class Fingerprint:
    """Fingerprint of one instruction, compared exactly (`exact`) or leniently."""

    digest: str  # Hash of the computation with its shapes and layouts.
    memories: str  # Memories (H: HBM, V: VMEM) of its operands in traversal order, ">", and those of its results.
    depthless_digest: str  # `digest` without the leading sizes of stacked layers and indices into them.

    @property
    def exact(self) -> str:
        return f"{self.digest} {self.memories}"


@dataclasses.dataclass
class _ComputationDigest:
    """Digest of one computation, with or without the sizes of stacked layers."""

    digest: str
    parameters: list[int]  # Numbers of its parameters, in traversal order.
    results: list[Instruction]


class Fingerprints:
    """Fingerprints of a module's instructions; `depths` are the possible leading sizes of stacked layers."""

    def __init__(self, module: Module, depths: frozenset[int]):
        self._named = {name: module.named(name) for name in module.computations}
        self._stack = re.compile(rf"\[(?:{'|'.join(map(str, sorted(depths)))})(?=,)") if depths else None
        self._digests: dict[tuple[str, bool], _ComputationDigest] = {}

    def of(self, instruction: Instruction, computation: str) -> Fingerprint:
        """Returns the fingerprint of an instruction of `computation`."""
        named = self._named[computation]
        operands = [named[name].shape if name in named else "" for name in instruction.operands]
        digest, depthless_digest = (self._digest(instruction, operands, mask_depth) for mask_depth in (False, True))
        results = [instruction.shape]
        if instruction.calls:
            called = self._digest_of(instruction.calls, mask_depth=False)
            operands = [operands[number] for number in called.parameters]
            results = [result.shape for result in called.results]
        return Fingerprint(digest, f"{_memories(operands)}>{_memories(results)}", depthless_digest)

    def _digest(self, instruction: Instruction, operands: list[str], mask_depth: bool) -> str:
        if instruction.calls:
            return _hash(instruction.opcode, self._digest_of(instruction.calls, mask_depth).digest)
        shapes = [self._clean(shape, mask_depth) for shape in (instruction.shape, *operands)]
        return _hash(instruction.opcode, *shapes, self._attributes(instruction, mask_depth))

    def _digest_of(self, computation: str, mask_depth: bool) -> _ComputationDigest:
        key = (computation, mask_depth)
        if key not in self._digests:
            self._digests[key] = self._compute(self._named[computation], mask_depth)
        return self._digests[key]

    def _compute(self, lines: dict[str, Instruction], mask_depth: bool) -> _ComputationDigest:
        root = next(instruction for instruction in lines.values() if instruction.root)
        results = [root]
        if root.opcode == "tuple":
            results = [lines[name] for name in root.operands if not _passes_through(lines[name])]
        digests: dict[str, str] = {}
        parameters: list[int] = []
        stack = list(reversed(results))
        while stack:  # Depth first, without recursion: a fusion may be hundreds of operations deep.
            instruction = stack[-1]
            missing = [name for name in instruction.operands if name in lines and name not in digests]
            if missing:
                stack += [lines[name] for name in reversed(missing)]
                continue
            stack.pop()
            if instruction.name not in digests:
                digests[instruction.name] = self._line(
                    instruction,
                    [digests[name] for name in instruction.operands if name in lines],
                    parameters,
                    mask_depth,
                )
        return _ComputationDigest(_hash(*(digests[result.name] for result in results)), parameters, results)

    def _line(self, instruction: Instruction, operands: list[str], parameters: list[int], mask_depth: bool) -> str:
        shape = self._clean(instruction.shape, mask_depth)
        if instruction.opcode == "parameter":
            parameters.append(int(instruction.rest[1 : instruction.rest.index(")")]))
            return _hash("parameter", str(len(parameters)), shape)
        constant = instruction.rest.partition(")")[0] if instruction.opcode == "constant" else ""
        if mask_depth and re.match(r"[su]32\[\]", instruction.shape):
            constant = ""
        called = [
            self._digest_of(name, mask_depth).digest
            for name in _CALLED.findall(instruction.rest)
            if name in self._named
        ]
        return _hash(instruction.opcode, shape, constant, self._attributes(instruction, mask_depth), *operands, *called)

    def _clean(self, shape: str, mask_depth: bool) -> str:
        shape = _SPACE.sub("", shape)
        return self._stack.sub("[*", shape) if mask_depth and self._stack else shape

    @staticmethod
    def _attributes(instruction: Instruction, mask_depth: bool) -> str:
        attributes = _IGNORED_ATTRIBUTES.sub("", instruction.attributes)
        return re.sub(r"slice=\{\[\d+:\d+\]", "slice={[*]", attributes) if mask_depth else attributes


def _memories(shapes: list[str]) -> str:
    return "".join("V" if _VMEM in shape else "H" for shape in shapes)


def _passes_through(instruction: Instruction) -> bool:
    """Whether a result is only passed through, as the buffer of a collective in flight."""
    return instruction.opcode == "parameter" or instruction.opcode.startswith(KINDS)


def _hash(*parts: str) -> str:
    return hashlib.blake2b("\0".join(parts).encode(), digest_size=12).hexdigest()
