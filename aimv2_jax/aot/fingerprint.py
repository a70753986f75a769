"""What a scheduled instruction computes, without its name: equal fingerprints take equal cycles.

The fused computation is read from its results backwards, so that names and the order of lines don't count; shapes,
layouts, attributes and constants do. Parameters are numbered as they are met. What only travels along is left out: the
pieces of an asynchronous collective that the compiler fused into a matmul.
"""

from __future__ import annotations

import dataclasses
import hashlib
import re

from aimv2_jax.aot.collectives import KINDS
from aimv2_jax.aot.hlo import Instruction, Module

# Attributes that say where an instruction comes from or which neighbour it talks to, not what it computes.
_IDLE = re.compile(
    r',? ?(?:metadata=\{(?:[^{}"]|"(?:[^"\\]|\\.)*")*\}|backend_config=.*$|frontend_attributes=\{[^{}]*\}'
    r"|sharding=\{[^{}]*\}|channel_id=\d+|output_to_operand_aliasing=\{.*?\}(?=, [a-z])|calls=%?[\w.\-]+"
    r"|to_apply=%?[\w.\-]+|/\*[^*]*\*/)"
)
_SPACE = re.compile(r"S\(\d+\)")
_CALLED = re.compile(r"(?:calls|to_apply)=%?([\w.\-]+)")
_VMEM = "S(1)"


@dataclasses.dataclass(frozen=True)
class Fingerprint:
    """Readings of one instruction, from strict to lenient."""

    anywhere: str  # What it computes, on which shapes and layouts.
    places: str  # The memories (H: HBM, V: VMEM) of what it reads, in the order of reading, and of its results.
    stacked: str  # As `anywhere`, without the leading size of stacks of layers and places within them.

    @property
    def exact(self) -> str:
        return f"{self.anywhere} {self.places}"


@dataclasses.dataclass
class _Reading:
    """One computation, read with or without the sizes of stacks."""

    digest: str
    parameters: list[int]  # Numbers of its parameters, in the order of reading.
    results: list[Instruction]


class Fingerprints:
    """Fingerprints of a module's instructions; `depths` are the leading sizes that a stack of layers may have."""

    def __init__(self, module: Module, depths: frozenset[int] = frozenset()):
        self._named = {name: module.named(name) for name in module.computations}
        self._stack = re.compile(rf"\[(?:{'|'.join(map(str, sorted(depths)))})(?=,)") if depths else None
        self._readings: dict[tuple[str, bool], _Reading] = {}

    def of(self, one: Instruction, computation: str) -> Fingerprint:
        """The fingerprint of an instruction of `computation`."""
        named = self._named[computation]
        operands = [named[name].shape if name in named else "" for name in one.operands]
        if one.calls:
            reading = self._read(one.calls, masked=False)
            anywhere, stacked = (_digest(one.opcode, self._read(one.calls, masked).digest) for masked in (False, True))
            operands = [operands[number] for number in reading.parameters]
            results = [result.shape for result in reading.results]
        else:
            anywhere, stacked = (
                _digest(
                    one.opcode,
                    self._clean(one.shape, masked),
                    *(self._clean(shape, masked) for shape in operands),
                    self._attributes(one, masked),
                )
                for masked in (False, True)
            )
            results = [one.shape]
        places = "".join("V" if _VMEM in shape else "H" for shape in operands)
        return Fingerprint(
            anywhere, f"{places}>{''.join('V' if _VMEM in shape else 'H' for shape in results)}", stacked
        )

    def _read(self, computation: str, masked: bool) -> _Reading:
        key = (computation, masked)
        if key not in self._readings:
            self._readings[key] = self._read_new(self._named[computation], masked)
        return self._readings[key]

    def _read_new(self, lines: dict[str, Instruction], masked: bool) -> _Reading:
        root = next(one for one in lines.values() if one.root)
        results = [root]
        if root.opcode == "tuple":
            results = [lines[name] for name in root.operands if not _travels(lines[name])]
        digests: dict[str, str] = {}
        parameters: list[int] = []
        ahead = list(reversed(results))
        while ahead:  # Depth first, without recursion: a fusion may be hundreds of operations deep.
            one = ahead[-1]
            missing = [name for name in one.operands if name in lines and name not in digests]
            if missing:
                ahead += [lines[name] for name in reversed(missing)]
                continue
            ahead.pop()
            if one.name not in digests:
                digests[one.name] = self._line(
                    one, [digests[name] for name in one.operands if name in lines], parameters, masked
                )
        return _Reading(_digest(*(digests[result.name] for result in results)), parameters, results)

    def _line(self, one: Instruction, operands: list[str], parameters: list[int], masked: bool) -> str:
        shape = self._clean(one.shape, masked)
        if one.opcode == "parameter":
            parameters.append(int(one.rest[1 : one.rest.index(")")]))
            return _digest("parameter", str(len(parameters)), shape)
        constant = one.rest.partition(")")[0] if one.opcode == "constant" else ""
        if masked and re.match(r"[su]32\[\]", one.shape):
            constant = ""
        called = [self._read(name, masked).digest for name in _CALLED.findall(one.rest) if name in self._named]
        return _digest(one.opcode, shape, constant, self._attributes(one, masked), *operands, *called)

    def _clean(self, shape: str, masked: bool) -> str:
        shape = _SPACE.sub("", shape)
        return self._stack.sub("[*", shape) if masked and self._stack else shape

    @staticmethod
    def _attributes(one: Instruction, masked: bool) -> str:
        kept = _IDLE.sub("", one.attributes)
        return re.sub(r"slice=\{\[\d+:\d+\]", "slice={[*]", kept) if masked else kept


def _travels(one: Instruction) -> bool:
    """Whether a result is only passed through: a buffer of a collective on its way."""
    return one.opcode == "parameter" or one.opcode.startswith(KINDS)


def _digest(*parts: str) -> str:
    return hashlib.blake2b("\0".join(parts).encode(), digest_size=12).hexdigest()
