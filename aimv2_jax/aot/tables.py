"""Sums over a step's scheduled instructions and collectives: the tables of a prediction."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from aimv2_jax.aot.collectives import BETWEEN_SLICES, KINDS, Collective
from aimv2_jax.aot.cost_model.cycles import CycleEstimate, Source
from aimv2_jax.aot.cost_model.flops import flops_of
from aimv2_jax.aot.cost_model.timeline import ScheduleTimes
from aimv2_jax.aot.hlo import Instruction, Module, Scheduled
from aimv2_jax.aot.prediction import CollectiveTotal, KernelTotal, OperationTotal, SliceTraffic

_NUM_TOP = 20
_MAX_METRIC_BYTES = 2**14  # Collectives up to this size carry losses, counts and norms.

# Parts of the model by pattern of an operation's traced name; the first pattern that matches decides.
_PARTS = (
    (r"teacher", "teacher"),
    (r"\.text_embedding", "text tower"),
    (r"encoder.*(attention|norm_1)", "encoder attention"),
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
# A fusion of only these opcodes moves or converts data and counts as a copy.
_COPY_OPCODES = frozenset(
    [
        *("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "copy", "transpose", "reshape", "slice"),
        *("dynamic-slice", "concatenate", "pad", "dynamic-update-slice", "broadcast", "convert", "iota", "fusion"),
    ]
)

Costs = Sequence[tuple[Scheduled, CycleEstimate]]


def _sums(rows: Iterable[tuple[Any, ...]]) -> dict[Any, list[float]]:
    """Sums the values of all rows (key, *values) that have the same key."""
    totals: dict[Any, list[float]] = {}
    for key, *values in rows:
        totals[key] = [a + b for a, b in zip(totals[key], values)] if key in totals else values
    return totals


def collective_totals(timing: ScheduleTimes) -> list[CollectiveTotal]:
    """Sums collectives by kind, mesh axes, element types, and async or sync; the slowest come first."""

    def group(item: Collective) -> tuple[str, str, str, bool]:
        types = ", ".join(sorted({array.dtype for array in item.arrays})) or "scalars"
        return item.kind, " x ".join(item.axes) or "none", types, item.asynchronous

    totals = _sums(
        (group(item), times, times * item.num_bytes, times * (item.route.seconds * 1e3), times * (exposed_s * 1e3))
        for item, times, exposed_s in timing.collectives
    )
    rows = [CollectiveTotal(*key, *values) for key, values in totals.items()]
    return sorted(rows, key=lambda row: -row.ms)


def gradient_dtypes(timing: ScheduleTimes) -> dict[str, int]:
    """Returns the bytes of reduced gradients by element type, most bytes first, to check the config's reduce_dtype."""
    totals = _sums(
        (dtype, times * item.num_bytes)
        for item, times, _ in timing.collectives
        if item.kind.startswith(("reduce-scatter", "all-reduce")) and item.num_bytes > _MAX_METRIC_BYTES
        for dtype in {array.dtype for array in item.arrays}
    )
    return {dtype: num_bytes for dtype, [num_bytes] in sorted(totals.items(), key=lambda total: -total[1][0])}


def slice_traffic(timing: ScheduleTimes) -> list[SliceTraffic]:
    """Sums the traffic between slices by kind of collective and by what it carries.

    Only gradients, losses, counts and norms should cross slices; all else is labelled "other" and is a problem.
    """

    def carries(item: Collective) -> str:
        if "transpose(" in item.op_name and "all-reduce" in item.kind:
            return "gradients"
        if item.num_bytes <= _MAX_METRIC_BYTES:
            return "losses, counts and norms"
        return f"other: {item.op_name or ', '.join(map(str, item.arrays))}"

    totals = _sums(
        ((item.kind, carries(item)), times, times * item.num_bytes)
        for item, times, _ in timing.collectives
        if BETWEEN_SLICES in item.kind
    )
    return [SliceTraffic(*key, *values) for key, values in totals.items()]


def cycle_sources(costs: Costs) -> dict[str, float]:
    """Returns each source's share of all cycles."""
    totals = _sums((estimate.source.value, item.times * estimate.cycles) for item, estimate in costs)
    total = sum(cycles for [cycles] in totals.values()) or 1.0
    return {source: cycles / total for source, [cycles] in totals.items() if cycles}


def kernel_totals(costs: Costs) -> list[KernelTotal]:
    """Sums the cycles that the roofline rule estimated, by kernel; the most expensive kernels come first."""

    def group(item: Scheduled) -> tuple[str, bool]:
        pallas = item.instruction.custom_call_target == "tpu_custom_call"
        return item.instruction.stem, pallas and '"cost_estimate"' in item.instruction.rest

    totals = _sums(
        (group(item), item.times, item.times * estimate.cycles / 1e6)
        for item, estimate in costs
        if estimate.source in (Source.KERNEL, Source.BYTES)
    )
    return sorted((KernelTotal(*key, *values) for key, values in totals.items()), key=lambda row: -row.mcycles)


def top_operations(module: Module, costs: Costs, flops_per_cycle: float) -> list[OperationTotal]:
    """Returns the most expensive operations, merged by part of the model, traced name and shape."""
    attribution = Attribution(module)
    flops_cache: dict[str, float] = {}

    def group(item: Scheduled) -> tuple[str, str, str]:
        instruction = item.instruction
        shape = re.sub(r"\{[^{}]*\}", "", instruction.shape).split(", bf16[1,")[0].split(", s32[2]")[0]
        return attribution.part(instruction), _shorten_name(instruction.op_name) or instruction.stem, shape[:60]

    totals = _sums(
        (
            group(item),
            item.times,
            item.times * estimate.cycles,
            item.times * flops_of(item.instruction, item.computation, module, flops_cache),
        )
        for item, estimate in costs
        if estimate.cycles
    )
    total = sum(cycles for _, cycles, _ in totals.values()) or 1.0
    largest = sorted(totals.items(), key=lambda item: -item[1][1])[:_NUM_TOP]
    return [
        OperationTotal(*key, count, cycles / count / 1e3, cycles / total, flops / cycles / flops_per_cycle)
        for key, (count, cycles, flops) in largest
    ]


def breakdown(module: Module, costs: Costs, timing: ScheduleTimes, clock_hz: float) -> dict[str, dict[str, float]]:
    """Sums megacycles by part of the model and kind of instruction; collectives count only their exposed time."""
    attribution = Attribution(module)
    sums: dict[str, dict[str, float]] = defaultdict(lambda: defaultdict(float))
    for item, estimate in costs:
        if estimate.cycles:
            kinds = sums[attribution.part(item.instruction)]
            kinds[attribution.kind(item.instruction)] += item.times * estimate.cycles / 1e6
    for collective, times, exposed_s in timing.collectives:
        if exposed_s:
            kinds = sums[attribution.part_of(collective.op_name)]
            kinds["exposed collectives"] += times * exposed_s * clock_hz / 1e6
    return {part: dict(kinds) for part, kinds in sorted(sums.items(), key=lambda item: -sum(item[1].values()))}


class Attribution:
    """Part of the model and kind of work of a module's scheduled instructions."""

    def __init__(self, module: Module):
        self._module = module
        self._opcodes: dict[str, frozenset[str]] = {}

    def part(self, instruction: Instruction) -> str:
        """Returns the part of the model, by the traced name of the instruction or of the first operation inside it."""
        return self.part_of(instruction.op_name or next(self._op_names(instruction.calls), ""))

    @staticmethod
    def part_of(op_name: str) -> str:
        """Returns the part of the model for a traced operation name."""
        return next((part for pattern, part in _PARTS if re.search(pattern, op_name)), "no name")

    def _op_names(self, computation: str | None) -> Iterator[str]:
        for line in self._module.computations.get(computation, []) if computation else []:
            if line.opcode != "parameter" and line.op_name:
                yield line.op_name
            yield from self._op_names(line.calls)

    def kind(self, instruction: Instruction) -> str:
        """Returns "matmul", "kernel", "other call", "collective", "copy" or "elementwise"."""
        if instruction.opcode == "custom-call":
            return "kernel" if instruction.custom_call_target == "tpu_custom_call" else "other call"
        opcodes = self._opcodes_inside(instruction.calls) if instruction.calls else frozenset({instruction.opcode})
        if opcodes & {"convolution", "dot"}:
            return "matmul"
        if any(opcode.startswith(KINDS) for opcode in opcodes):
            return "collective"
        return "copy" if opcodes <= _COPY_OPCODES else "elementwise"

    def _opcodes_inside(self, computation: str) -> frozenset[str]:
        if computation not in self._opcodes:
            opcodes: set[str] = set()
            for line in self._module.computations.get(computation, []):
                opcodes |= {line.opcode} | (self._opcodes_inside(line.calls) if line.calls else frozenset())
            self._opcodes[computation] = frozenset(opcodes)
        return self._opcodes[computation]


def _shorten_name(op_name: str) -> str:
    """Returns the last three components of a traced name, after "backward: " for an operation of the backward pass."""
    backward = "backward: " if "transpose(" in op_name else ""
    pieces = [piece for piece in op_name.partition(";")[0].split("/") if "(" not in piece]
    return backward + "/".join(pieces[-3:]) if pieces else ""
