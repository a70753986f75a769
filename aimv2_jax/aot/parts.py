"""Which part of the model an instruction belongs to, and of what kind it is."""

from __future__ import annotations

import re
from collections.abc import Iterator

from aimv2_jax.aot.collectives import KINDS
from aimv2_jax.aot.hlo import Instruction, Module
from aimv2_jax.aot.kernels import target_of

# The first match of an operation's name in the traced program decides.
_PARTS = (
    (r"encoder/.*(attention|norm_1)|encoder.*(attention|norm_1)", "encoder attention"),
    (r"encoder/.*(mlp|norm_2)", "encoder mlp"),
    (r"decoder/.*(attention|norm_1)", "decoder attention"),
    (r"decoder/.*(mlp|norm_2)", "decoder mlp"),
    (r"embed|_look_up|patch_norm", "embeddings"),
    (r"head|predict|log_softmax|logsumexp|softmax_cross", "heads and losses"),
    (r"encoder/", "encoder, rest"),
    (r"decoder/", "decoder, rest"),
    (r"threefry|random|prefix|_uniform|randint", "data and prefixes"),
    (r"jvp\(", "heads and losses"),
    (r"^jit\(\w+\)/", "optimiser"),
)
_MOVES = frozenset(
    [
        *("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "copy", "transpose", "reshape", "slice"),
        *("dynamic-slice", "concatenate", "pad", "dynamic-update-slice", "broadcast", "convert", "iota", "fusion"),
    ]
)


class Parts:
    """Reads parts and kinds of a module's scheduled instructions."""

    def __init__(self, module: Module):
        self._module = module
        self._opcodes: dict[str, frozenset[str]] = {}

    def part(self, one: Instruction) -> str:
        """A part of the model, by the name that the trace gave the operation, or one inside it."""
        return self.part_of(one.op_name or next(self._names(one.calls), ""))

    @staticmethod
    def part_of(op_name: str) -> str:
        """The part that a name of the trace belongs to."""
        return next((part for pattern, part in _PARTS if re.search(pattern, op_name)), "no name")

    def _names(self, computation: str | None) -> Iterator[str]:
        for line in self._module.computations.get(computation, []) if computation else []:
            if line.opcode != "parameter" and line.op_name:
                yield line.op_name
            yield from self._names(line.calls)

    def kind(self, one: Instruction) -> str:
        """matmul, kernel, collective, copy or elementwise."""
        if one.opcode == "custom-call":
            return "kernel" if target_of(one) == "tpu_custom_call" else "other call"
        opcodes = self._inside(one.calls) if one.calls else frozenset({one.opcode})
        if opcodes & {"convolution", "dot"}:
            return "matmul"
        if any(opcode.startswith(KINDS) for opcode in opcodes):
            return "collective"
        return "copy" if opcodes <= _MOVES else "elementwise"

    def _inside(self, computation: str) -> frozenset[str]:
        if computation not in self._opcodes:
            found: set[str] = set()
            for line in self._module.computations.get(computation, []):
                found |= {line.opcode} | (self._inside(line.calls) if line.calls else frozenset())
            self._opcodes[computation] = frozenset(found)
        return self._opcodes[computation]
