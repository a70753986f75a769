"""Kernels the compiler gives no cycles for: max(FLOPs at half of the peak, bytes at four fifths of HBM's bandwidth)."""

from __future__ import annotations

import re

from aimv2_jax.aot.chips import Chip
from aimv2_jax.aot.hlo import Array, Instruction, Module

FLOPS_SHARE = 0.5
BANDWIDTH_SHARE = 0.8
# Custom calls and fusions that move or compute nothing of their own: memory by another name, and marks of other passes.
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
# What never computes: names for values, and starts and ends of what other units do beside the cores.
FREE_OPCODES = frozenset(
    [
        *("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "domain", "opt-barrier"),
        *("partition-id", "replica-id", "while", "call", "conditional", "send", "send-done", "recv", "recv-done"),
    ]
)
_SCALARS = 64  # Bytes: what lives in scalar memory is no kernel.


def target_of(one: Instruction) -> str:
    """The target of a custom call, "" of anything else."""
    match = re.search(r'custom_call_target="([^"]*)"', one.rest)
    return match[1] if match else ""


def stated_cost(one: Instruction) -> tuple[float, float] | None:
    """FLOPs and bytes that a Pallas kernel states of itself (`pl.CostEstimate`)."""
    match = re.search(r'"cost_estimate":\{([^}]*)\}', one.rest)
    if not match:
        return None
    stated = {name: float(value) for name, value in re.findall(r'"(\w+)":"?([\d.e+]+)"?', match[1])}
    return stated.get("flops", 0.0), stated.get("bytes_accessed", 0.0)


def is_free(one: Instruction) -> bool:
    """Whether an instruction without the compiler's cycles takes none: nothing moves, or another unit moves it.

    Copies between HBM and VMEM that the compiler starts ahead (`copy-start`, `slice-start`) are such.
    """
    if one.opcode in FREE_OPCODES or one.opcode.endswith(("-start", "-update", "-done")):
        return True
    if one.opcode == "custom-call":
        return target_of(one) in FREE_TARGETS
    return sum(map(_bytes, one.arrays)) <= _SCALARS


def rule_cycles(one: Instruction, computation: str, module: Module, chip: Chip) -> float:
    """Cycles by the rule, from the kernel's own cost if it states one, else from operands and results."""
    flops, num_bytes = stated_cost(one) or (0.0, float(moved_bytes(one, computation, module)))
    seconds = max(flops / (FLOPS_SHARE * chip.peak_flops), num_bytes / (BANDWIDTH_SHARE * chip.hbm_bytes_per_s))
    return seconds * chip.clock_hz


def moved_bytes(one: Instruction, computation: str, module: Module) -> int:
    """Bytes that an instruction reads and writes.

    Of an operand that is only sliced, the slices count; of a result that is an operand with a part written anew, that
    part, twice.
    """
    if one.calls and one.calls in module.computations:
        return _fused_bytes(one.calls, module)
    named = module.named(computation)
    reads = sum(_size(named[name]) for name in one.operands if name in named)
    writes = _size(one)
    if one.opcode in ("slice", "dynamic-slice", "gather"):
        reads = writes
    if one.opcode in ("dynamic-update-slice", "scatter") and len(one.operands) > 1 and one.operands[-1] in named:
        return 2 * _size(named[one.operands[1 if one.opcode == "dynamic-update-slice" else -1]])
    return reads + writes


def _fused_bytes(computation: str, module: Module) -> int:
    lines = module.named(computation)
    reads = sum(_read_of(one, computation, module) for one in lines.values() if one.opcode == "parameter")
    root = next(one for one in lines.values() if one.root)
    results = [lines[name] for name in root.operands] if root.opcode == "tuple" else [root]
    return reads + sum(_written_of(result, computation, module) for result in results)


def _read_of(value: Instruction, computation: str, module: Module) -> int:
    """Bytes of a fused computation's value that its users read: of what is only sliced, the slices."""
    total = 0
    for user in module.computations[computation]:
        if value.name not in user.operands or user.opcode == "tuple":
            continue
        if user.opcode in ("slice", "dynamic-slice"):
            total += _size(user)
        elif user.opcode == "bitcast":
            total += _read_of(user, computation, module)
        elif user.calls in module.computations:
            number = user.operands.index(value.name)
            inner = [one for one in module.computations[user.calls] if one.opcode == "parameter"]
            total += sum(_read_of(one, user.calls, module) for one in inner if one.rest.startswith(f"({number})"))
        elif not (user.opcode == "dynamic-update-slice" and user.operands[0] == value.name):
            total += _size(value)
    return min(total, _size(value))


def _written_of(result: Instruction, computation: str, module: Module) -> int:
    """Bytes of a fused computation's result that are written: of an operand with a part written anew, the part."""
    lines = module.named(computation)
    while result.opcode == "bitcast" and result.operands[0] in lines:
        result = lines[result.operands[0]]
    if result.opcode == "parameter":
        return 0
    if result.opcode == "dynamic-update-slice":
        return _size(lines[result.operands[1]])
    if result.calls in module.computations:
        root = next(one for one in module.computations[result.calls] if one.root)
        return _written_of(root, result.calls, module) if root.opcode != "tuple" else _size(result)
    return _size(result)


def _size(one: Instruction) -> int:
    return sum(_bytes(array) for array in one.arrays)


def _bytes(array: Array) -> int:
    return 0 if array.dtype == "token" else array.bytes
