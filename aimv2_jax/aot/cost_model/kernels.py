"""Roofline rule for kernels without a cycle estimate: max(FLOPs at half of peak, bytes at 4/5 of HBM bandwidth)."""

from __future__ import annotations

import re

from aimv2_jax.aot.hlo import Instruction, Module
from aimv2_jax.parallel.hardware import Chip

FLOPS_SHARE = 0.5
BANDWIDTH_SHARE = 0.8
# Custom calls that take no cycles: they alias memory or mark something for a compiler pass.
_FREE_TARGETS = frozenset(
    {
        "AllocateBuffer",
        "AssumeGatherIndicesInBound",
        "AsyncCollectiveDone",
        "AsyncCollectiveStart",
        "ConcatBitcast",
        "GatherScatterIndicesBitpacked",
    }
)
# Opcodes that take no cycles: they alias values, or start or end work on another unit.
FREE_OPCODES = frozenset(
    [
        *("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "domain", "opt-barrier"),
        *("partition-id", "replica-id", "while", "call", "conditional", "send", "send-done", "recv", "recv-done"),
    ]
)
_MAX_SCALAR_BYTES = 64  # Instructions with results up to this size work in scalar memory and take no cycles.


def declared_cost(instruction: Instruction) -> tuple[float, float] | None:
    """Returns the FLOPs and bytes that a Pallas kernel declares (`pl.CostEstimate`), or None."""
    match = re.search(r'"cost_estimate":\{([^}]*)\}', instruction.rest)
    if not match:
        return None
    declared = {name: float(value) for name, value in re.findall(r'"(\w+)":"?([\d.e+]+)"?', match[1])}
    return declared.get("flops", 0.0), declared.get("bytes_accessed", 0.0)


def is_free(instruction: Instruction) -> bool:
    """Whether an instruction without an estimate takes no cycles: it does no work, or another unit does it.

    Copies between HBM and VMEM that the compiler starts ahead (`copy-start`, `slice-start`) are free.
    """
    if instruction.opcode in FREE_OPCODES or instruction.opcode.endswith(("-start", "-update", "-done")):
        return True
    if instruction.opcode == "custom-call":
        return instruction.custom_call_target in _FREE_TARGETS
    return instruction.num_bytes <= _MAX_SCALAR_BYTES


def roofline_cycles(instruction: Instruction, computation: str, module: Module, chip: Chip) -> float:
    """Returns cycles by the roofline rule, from the kernel's declared cost or from its operands and results."""
    flops, num_bytes = declared_cost(instruction) or (0.0, float(accessed_bytes(instruction, computation, module)))
    seconds = max(flops / (FLOPS_SHARE * chip.peak_flops), num_bytes / (BANDWIDTH_SHARE * chip.hbm_bytes_per_s))
    return seconds * chip.clock_hz


def accessed_bytes(instruction: Instruction, computation: str, module: Module) -> int:
    """Returns the bytes that an instruction reads and writes.

    An operand that is only sliced counts the bytes of its slices. An in-place update counts the updated part twice: it
    is read as an operand and written to the result.
    """
    if instruction.calls and instruction.calls in module.computations:
        return _fused_bytes(instruction.calls, module)
    named = module.named(computation)
    operands = instruction.operands
    update_index = {"dynamic-update-slice": 1, "scatter": -1}.get(instruction.opcode)
    if update_index is not None and len(operands) > 1 and operands[-1] in named:
        return 2 * named[operands[update_index]].num_bytes
    if instruction.opcode in ("slice", "dynamic-slice", "gather"):
        return 2 * instruction.num_bytes
    return instruction.num_bytes + sum(named[name].num_bytes for name in operands if name in named)


def _fused_bytes(computation: str, module: Module) -> int:
    lines = module.named(computation)
    parameters = [line for line in lines.values() if line.opcode == "parameter"]
    root = module.root(computation)
    results = [lines[name] for name in root.operands] if root.opcode == "tuple" else [root]
    reads = sum(_read_bytes(parameter, computation, module) for parameter in parameters)
    return reads + sum(_written_bytes(result, computation, module) for result in results)


def _read_bytes(value: Instruction, computation: str, module: Module) -> int:
    """Returns the bytes of a value that its users in a fusion read. A slice reads only its own bytes."""
    total = 0
    for user in module.computations[computation]:
        if value.name not in user.operands or user.opcode == "tuple":
            continue
        if user.opcode in ("slice", "dynamic-slice"):
            total += user.num_bytes
        elif user.opcode == "bitcast":
            total += _read_bytes(user, computation, module)
        elif user.calls in module.computations:
            number = f"({user.operands.index(value.name)})"
            total += sum(
                _read_bytes(line, user.calls, module)
                for line in module.computations[user.calls]
                if line.opcode == "parameter" and line.rest.startswith(number)
            )
        elif not (user.opcode == "dynamic-update-slice" and user.operands[0] == value.name):
            total += value.num_bytes
    return min(total, value.num_bytes)


def _written_bytes(result: Instruction, computation: str, module: Module) -> int:
    """Returns the bytes that a fusion writes for a result. An in-place update writes only the updated part."""
    lines = module.named(computation)
    while result.opcode == "bitcast" and result.operands[0] in lines:
        result = lines[result.operands[0]]
    if result.opcode == "parameter":
        return 0
    if result.opcode == "dynamic-update-slice":
        return lines[result.operands[1]].num_bytes
    if result.calls in module.computations:
        root = module.root(result.calls)
        return result.num_bytes if root.opcode == "tuple" else _written_bytes(root, result.calls, module)
    return result.num_bytes
