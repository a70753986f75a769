"""Roofline rule for kernels without a cycle estimate: max(FLOPs at half of peak, bytes at 4/5 of HBM bandwidth)."""

from __future__ import annotations

import re

from aimv2_jax.aot.hlo import Array, Instruction, Module
from aimv2_jax.parallel.hardware import Chip

FLOPS_SHARE = 0.5
BANDWIDTH_SHARE = 0.8
# Custom calls without work of their own: aliases of memory, and markers of compiler passes.
FREE_TARGETS = frozenset(
    {
        "AllocateBuffer",
        "AssumeGatherIndicesInBound",
        "AsyncCollectiveDone",
        "AsyncCollectiveStart",
        "ConcatBitcast",
        "GatherScatterIndicesBitpacked",
    }
)
# Opcodes without compute: aliases of values, and starts and ends of work on other units.
FREE_OPCODES = frozenset(
    [
        *("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "domain", "opt-barrier"),
        *("partition-id", "replica-id", "while", "call", "conditional", "send", "send-done", "recv", "recv-done"),
    ]
)
_MAX_SCALAR_BYTES = 64  # Instructions on scalar memory are not kernels.


def custom_call_target(instruction: Instruction) -> str:
    """Returns the target of a custom call, "" for other instructions."""
    match = re.search(r'custom_call_target="([^"]*)"', instruction.rest)
    return match[1] if match else ""


def declared_cost(instruction: Instruction) -> tuple[float, float] | None:
    """Returns the FLOPs and bytes that a Pallas kernel declares (`pl.CostEstimate`), or None."""
    match = re.search(r'"cost_estimate":\{([^}]*)\}', instruction.rest)
    if not match:
        return None
    declared = {name: float(value) for name, value in re.findall(r'"(\w+)":"?([\d.e+]+)"?', match[1])}
    return declared.get("flops", 0.0), declared.get("bytes_accessed", 0.0)


def is_free(instruction: Instruction) -> bool:
    """Whether an instruction without an estimate takes no cycles: it moves nothing, or another unit moves it.

    Copies between HBM and VMEM that the compiler starts ahead (`copy-start`, `slice-start`) are free.
    """
    if instruction.opcode in FREE_OPCODES or instruction.opcode.endswith(("-start", "-update", "-done")):
        return True
    if instruction.opcode == "custom-call":
        return custom_call_target(instruction) in FREE_TARGETS
    return sum(map(_bytes, instruction.arrays)) <= _MAX_SCALAR_BYTES


def roofline_cycles(instruction: Instruction, computation: str, module: Module, chip: Chip) -> float:
    """Returns cycles by the roofline rule, from the kernel's declared cost or from its operands and results."""
    flops, num_bytes = declared_cost(instruction) or (0.0, float(accessed_bytes(instruction, computation, module)))
    seconds = max(flops / (FLOPS_SHARE * chip.peak_flops), num_bytes / (BANDWIDTH_SHARE * chip.hbm_bytes_per_s))
    return seconds * chip.clock_hz


def accessed_bytes(instruction: Instruction, computation: str, module: Module) -> int:
    """Returns the bytes that an instruction reads and writes.

    For an operand that is only sliced, the slices count; for an in-place update of an operand, the updated part counts
    twice.
    """
    if instruction.calls and instruction.calls in module.computations:
        return _fused_bytes(instruction.calls, module)
    named = module.named(computation)
    reads = sum(_size(named[name]) for name in instruction.operands if name in named)
    writes = _size(instruction)
    if instruction.opcode in ("slice", "dynamic-slice", "gather"):
        reads = writes
    if (
        instruction.opcode in ("dynamic-update-slice", "scatter")
        and len(instruction.operands) > 1
        and instruction.operands[-1] in named
    ):
        return 2 * _size(named[instruction.operands[1 if instruction.opcode == "dynamic-update-slice" else -1]])
    return reads + writes


def _fused_bytes(computation: str, module: Module) -> int:
    lines = module.named(computation)
    reads = sum(
        _read_bytes(instruction, computation, module)
        for instruction in lines.values()
        if instruction.opcode == "parameter"
    )
    root = next(instruction for instruction in lines.values() if instruction.root)
    results = [lines[name] for name in root.operands] if root.opcode == "tuple" else [root]
    return reads + sum(_written_bytes(result, computation, module) for result in results)


def _read_bytes(value: Instruction, computation: str, module: Module) -> int:
    """Returns the bytes of a value that its users in a fusion read; if it is only sliced, the slices count."""
    total = 0
    for user in module.computations[computation]:
        if value.name not in user.operands or user.opcode == "tuple":
            continue
        if user.opcode in ("slice", "dynamic-slice"):
            total += _size(user)
        elif user.opcode == "bitcast":
            total += _read_bytes(user, computation, module)
        elif user.calls in module.computations:
            number = user.operands.index(value.name)
            inner = [
                instruction for instruction in module.computations[user.calls] if instruction.opcode == "parameter"
            ]
            total += sum(
                _read_bytes(instruction, user.calls, module)
                for instruction in inner
                if instruction.rest.startswith(f"({number})")
            )
        elif not (user.opcode == "dynamic-update-slice" and user.operands[0] == value.name):
            total += _size(value)
    return min(total, _size(value))


def _written_bytes(result: Instruction, computation: str, module: Module) -> int:
    """Returns the bytes of a fusion's result that are written; for an in-place update, the updated part counts."""
    lines = module.named(computation)
    while result.opcode == "bitcast" and result.operands[0] in lines:
        result = lines[result.operands[0]]
    if result.opcode == "parameter":
        return 0
    if result.opcode == "dynamic-update-slice":
        return _size(lines[result.operands[1]])
    if result.calls in module.computations:
        root = next(instruction for instruction in module.computations[result.calls] if instruction.root)
        return _written_bytes(root, result.calls, module) if root.opcode != "tuple" else _size(result)
    return _size(result)


def _size(instruction: Instruction) -> int:
    return sum(_bytes(array) for array in instruction.arrays)


def _bytes(array: Array) -> int:
    return 0 if array.dtype == "token" else array.bytes
