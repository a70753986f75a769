"""Attribution of instructions to parts of the model and to kinds of work."""

from __future__ import annotations

import re
from collections.abc import Iterator

from aimv2_jax.aot.collectives import KINDS
from aimv2_jax.aot.cost_model.kernels import custom_call_target
from aimv2_jax.aot.hlo import Instruction, Module

# Patterns for an operation's traced name, in order of precedence.
_PARTS = (
    (r"encoder/.*(attention|norm_1)|encoder.*(attention|norm_1)", "encoder attention"),
    (r"encoder/.*(mlp|norm_2)", "encoder mlp"),
    (r"decoder/.*(attention|norm_1)", "decoder attention"),
    (r"decoder/.*(mlp|norm_2)", "decoder mlp"),
    (r"embed|patch_norm", "embeddings"),
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


class Attribution:
    """Part of the model and kind of work of a module's scheduled instructions."""

    def __init__(self, module: Module):
        self._module = module
        self._opcodes: dict[str, frozenset[str]] = {}

    def part(self, instruction: Instruction) -> str:
        """Returns the part of the model, by the traced name of the operation or of one inside it."""
        return self.part_of(instruction.op_name or next(self._names(instruction.calls), ""))

    @staticmethod
    def part_of(op_name: str) -> str:
        """Returns the part of the model for a traced operation name."""
        return next((part for pattern, part in _PARTS if re.search(pattern, op_name)), "no name")

    def _names(self, computation: str | None) -> Iterator[str]:
        for line in self._module.computations.get(computation, []) if computation else []:
            if line.opcode != "parameter" and line.op_name:
                yield line.op_name
            yield from self._names(line.calls)

    def kind(self, instruction: Instruction) -> str:
        """Returns "matmul", "kernel", "other call", "collective", "copy" or "elementwise"."""
        if instruction.opcode == "custom-call":
            return "kernel" if custom_call_target(instruction) == "tpu_custom_call" else "other call"
        opcodes = self._inside(instruction.calls) if instruction.calls else frozenset({instruction.opcode})
        if opcodes & {"convolution", "dot"}:
            return "matmul"
        if any(opcode.startswith(KINDS) for opcode in opcodes):
            return "collective"
        return "copy" if opcodes <= _MOVES else "elementwise"

    def _inside(self, computation: str) -> frozenset[str]:
        if computation not in self._opcodes:
            opcodes: set[str] = set()
            for line in self._module.computations.get(computation, []):
                opcodes |= {line.opcode} | (self._inside(line.calls) if line.calls else frozenset())
            self._opcodes[computation] = frozenset(opcodes)
        return self._opcodes[computation]
