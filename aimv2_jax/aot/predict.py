"""Computes the figures of a report from a compiled module. All of them are predictions."""

from __future__ import annotations

import dataclasses
import re
from collections import defaultdict
from typing import Any

from aimv2_jax.aot.attribution import Attribution
from aimv2_jax.aot.collectives import BETWEEN_SLICES, Collective, Collectives
from aimv2_jax.aot.compiler import Compiled
from aimv2_jax.aot.cost_model.cycles import CompiledCostModel, CostModel, ProxyCostModel, Source
from aimv2_jax.aot.cost_model.flops import compiled_flops, flops_of
from aimv2_jax.aot.cost_model.kernels import custom_call_target
from aimv2_jax.aot.cost_model.timeline import ScheduleTimes, simulate
from aimv2_jax.aot.hlo import Module, parse_module
from aimv2_jax.aot.interconnect import layout_of
from aimv2_jax.aot.memory import GIB, read_memory
from aimv2_jax.aot.replication import find_replicated
from aimv2_jax.aot.schedule import scheduled
from aimv2_jax.aot.topology import Topology
from aimv2_jax.config import Config

TOP = 20
_MAX_SCALAR_BYTES = 2**14  # Upper bound of a message between slices that carries losses, counts and norms.


@dataclasses.dataclass(frozen=True)
class Proxy:
    """A shallow compile with cycles, and the stack depths of the proxy and of the full model."""

    compiled: Compiled
    depths: frozenset[int]


def predict(config: Config, topology: Topology, compiled: Compiled, proxy: Proxy | None) -> dict[str, Any]:
    """Returns every figure of a report as JSON data. `proxy` is needed if `compiled` has no code generation."""
    chip, program = topology.chip, compiled.program
    module = parse_module(compiled.text)
    collectives = Collectives(module, layout_of(program, chip, topology.shape))
    cost_model: CostModel = CompiledCostModel(module, collectives, chip)
    if proxy:
        cost_model = ProxyCostModel(module, cost_model, chip, parse_module(proxy.compiled.text), proxy.depths)
    timing = simulate(
        module,
        collectives,
        lambda instruction, computation: cost_model.estimate(instruction, computation).cycles / chip.clock_hz,
    )
    memory = read_memory(program, compiled.hbm_bytes, chip.hbm_limit_bytes)
    model_flops = program["flops_per_example"] * program["batch_size"] / program["num_chips"]
    pairs_flops = program["flops_of_allowed_pairs"] * program["batch_size"] / program["num_chips"]
    flops = compiled_flops(module)

    def utilisation(seconds: float) -> float:
        return model_flops / (seconds * chip.peak_flops)

    step_s, steps = timing.with_overlap_s, program["steps"]
    return {
        "compiles": True,
        "hbm_gib": memory.total / GIB,
        "hbm_limit_gib": memory.limit / GIB,
        "hbm_spare": memory.spare,
        "hbm_parts_gib": {
            name: getattr(memory, name) / GIB for name in ("parameters", "optimiser", "batch", "activations")
        },
        "model_tflops_per_chip": model_flops / 1e12,
        "model_tflops_per_chip_of_allowed_pairs": pairs_flops / 1e12,
        "compiled_tflops_per_chip": flops / 1e12,
        "recompute": flops / model_flops - 1,
        "predicted_mcycles": timing.compute_s * chip.clock_hz / 1e6,
        "predicted_compute_ms": timing.compute_s * 1e3,
        "predicted_ms_without_overlap": timing.without_overlap_s * 1e3,
        "predicted_ms": step_s * 1e3,
        "predicted_mfu": utilisation(timing.compute_s),
        "predicted_mfu_of_allowed_pairs": pairs_flops / (timing.compute_s * chip.peak_flops),
        "predicted_mfu_without_overlap": utilisation(timing.without_overlap_s),
        "predicted_mfu_with_comms": utilisation(step_s),
        "images_per_s": program["batch_size"] / step_s,
        "steps": steps,
        "days": steps * step_s / 86400,
        "chip_hours": steps * step_s / 3600 * program["num_chips"],
        "collectives": _collectives(timing),
        "gradient_dtypes": _gradient_dtypes(timing),
        "between_slices": _between_slices(timing),
        "replicated": find_replicated(module, collectives, program, config),
        "cycles_from": _cycle_sources(module, cost_model),
        "kernels": _kernels(module, cost_model),
        "top": _top(module, cost_model, chip.flops_per_cycle),
        "breakdown": _breakdown(module, cost_model, timing, chip.clock_hz),
        "versions": program["versions"],
        "compiler_options": program["compiler_options"],
        "mesh": dict(zip(program["axes"], program["shape"])),
        "num_chips": program["num_chips"],
        "batch_size": program["batch_size"],
        "patches": program["patches"],
        "compile_s": compiled.seconds + (proxy.compiled.seconds if proxy else 0),
    }


def refused(compiled: Compiled, topology: Topology) -> dict[str, Any]:
    """Returns the figures of a step that does not compile."""
    program = compiled.program
    return {
        "compiles": False,
        "refusal": compiled.refusal,
        "hbm_gib": None,
        "hbm_limit_gib": topology.chip.hbm_limit_bytes / GIB,
        "model_tflops_per_chip": program["flops_per_example"] * program["batch_size"] / program["num_chips"] / 1e12,
        "predicted_ms": None,
        "predicted_mfu": None,
        "predicted_mfu_with_comms": None,
        "collectives": [],
        "images_per_s": None,
        "versions": program["versions"],
        "mesh": dict(zip(program["axes"], program["shape"])),
        "num_chips": program["num_chips"],
        "batch_size": program["batch_size"],
        "patches": program["patches"],
    }


def _collectives(timing: ScheduleTimes) -> list[dict[str, Any]]:
    """Sums counts, bytes, milliseconds alone and exposed, by kind, mesh axes, element types and async or sync."""
    sums: dict[tuple, list[float]] = defaultdict(lambda: [0, 0, 0, 0])
    for collective, times, exposed_s in timing.collectives:
        types = ", ".join(sorted({text.partition("[")[0] for text in collective.arrays})) or "scalars"
        row = sums[(collective.kind, " x ".join(collective.axes) or "none", types, collective.asynchronous)]
        for column, value in enumerate((1, collective.num_bytes, collective.route.seconds * 1e3, exposed_s * 1e3)):
            row[column] += times * value
    return [
        {
            "kind": kind,
            "axis": axis,
            "dtype": types,
            "asynchronous": asynchronous,
            "count": int(count),
            "bytes": int(num_bytes),
            "ms": ms,
            "exposed_ms": exposed,
        }
        for (kind, axis, types, asynchronous), (count, num_bytes, ms, exposed) in sorted(
            sums.items(), key=lambda item: -item[1][2]
        )
    ]


def _is_gradient(collective: Collective) -> bool:
    return "transpose(" in collective.op_name


def _gradient_dtypes(timing: ScheduleTimes) -> dict[str, int]:
    """Sums the bytes of gradients reduced over devices by element type, to check the config's reduce_dtype."""
    bytes_of: dict[str, int] = defaultdict(int)
    for collective, times, _ in timing.collectives:
        if collective.kind.startswith(("reduce-scatter", "all-reduce")) and collective.num_bytes > _MAX_SCALAR_BYTES:
            for text in {text.partition("[")[0] for text in collective.arrays}:
                bytes_of[text] += times * collective.num_bytes
    return dict(sorted(bytes_of.items(), key=lambda item: -item[1]))


def _between_slices(timing: ScheduleTimes) -> list[dict[str, Any]]:
    """Sums the traffic between slices: gradients, losses and counts, and other traffic (a problem)."""
    sums: dict[tuple[str, str], list[int]] = defaultdict(lambda: [0, 0])
    for collective, times, _ in timing.collectives:
        if BETWEEN_SLICES not in collective.kind:
            continue
        if _is_gradient(collective) and "all-reduce" in collective.kind:
            carries = "gradients"
        elif collective.num_bytes <= _MAX_SCALAR_BYTES:
            carries = "losses, counts and norms"
        else:
            carries = f"other: {collective.op_name or ', '.join(collective.arrays)}"
        row = sums[(collective.kind, carries)]
        row[0] += times
        row[1] += times * collective.num_bytes
    return [
        {"kind": kind, "carries": carries, "count": count, "bytes": num_bytes}
        for (kind, carries), (count, num_bytes) in sums.items()
    ]


def _cycle_sources(module: Module, cost_model: CostModel) -> dict[str, float]:
    """Returns the share of the cycles from each source."""
    sums: dict[Source, float] = defaultdict(float)
    for item in scheduled(module):
        estimate = cost_model.estimate(item.instruction, item.computation)
        sums[estimate.source] += item.times * estimate.cycles
    total = sum(sums.values()) or 1.0
    return {source.value: cycles / total for source, cycles in sums.items() if cycles}


def _kernels(module: Module, cost_model: CostModel) -> list[dict[str, Any]]:
    """Sums the cycles that the roofline rule estimated, by kernel."""
    sums: dict[tuple[str, bool], list[float]] = defaultdict(lambda: [0, 0.0])
    for item in scheduled(module):
        instruction, estimate = item.instruction, cost_model.estimate(item.instruction, item.computation)
        if estimate.source in (Source.KERNEL, Source.BYTES):
            pallas = custom_call_target(instruction) == "tpu_custom_call"
            declares_cost = pallas and '"cost_estimate"' in instruction.rest
            row = sums[(re.sub(r"[.\d]+$", "", instruction.name), declares_cost)]
            row[0] += item.times
            row[1] += item.times * estimate.cycles / 1e6
    return [
        {"name": name, "states_its_cost": declares_cost, "count": int(count), "mcycles": mcycles}
        for (name, declares_cost), (count, mcycles) in sorted(sums.items(), key=lambda item: -item[1][1])
    ]


def _top(module: Module, cost_model: CostModel, flops_per_cycle: float) -> list[dict[str, Any]]:
    """Lists the most expensive operations, merged by traced name and shape."""
    sums: dict[tuple[str, str, str], list[float]] = defaultdict(lambda: [0, 0.0, 0.0])
    counted: dict[str, float] = {}
    parts = Attribution(module)
    for item in scheduled(module):
        instruction = item.instruction
        cycles = cost_model.estimate(instruction, item.computation).cycles
        if not cycles:
            continue
        shape = re.sub(r"\{[^{}]*\}", "", instruction.shape).split(", bf16[1,")[0].split(", s32[2]")[0]
        row = sums[
            (
                parts.part(instruction),
                _short(instruction.op_name) or re.sub(r"[.\d]+$", "", instruction.name),
                shape[:60],
            )
        ]
        row[0] += item.times
        row[1] += item.times * cycles
        row[2] += item.times * flops_of(instruction, item.computation, module, counted)
    total = sum(row[1] for row in sums.values()) or 1.0
    return [
        {
            "part": part,
            "operation": name,
            "shape": shape,
            "count": int(count),
            "kcycles_each": cycles / count / 1e3,
            "share": cycles / total,
            "of_peak": flops / cycles / flops_per_cycle,
        }
        for (part, name, shape), (count, cycles, flops) in sorted(sums.items(), key=lambda item: -item[1][1])[:TOP]
    ]


def _short(op_name: str) -> str:
    """Returns the last components of a traced name, marked if backward."""
    backward = "backward: " if "transpose(" in op_name else ""
    pieces = [piece for piece in op_name.partition(";")[0].split("/") if "(" not in piece]
    return backward + "/".join(pieces[-3:]) if pieces else ""


def _breakdown(
    module: Module, cost_model: CostModel, timing: ScheduleTimes, clock_hz: float
) -> dict[str, dict[str, float]]:
    """Sums megacycles by part of the model and kind of instruction; collectives count their exposed time."""
    parts = Attribution(module)
    sums: dict[str, dict[str, float]] = defaultdict(lambda: defaultdict(float))
    for item in scheduled(module):
        cycles = cost_model.estimate(item.instruction, item.computation).cycles
        if cycles:
            sums[parts.part(item.instruction)][parts.kind(item.instruction)] += item.times * cycles / 1e6
    for collective, times, exposed_s in timing.collectives:
        if exposed_s:
            sums[parts.part_of(collective.op_name)]["exposed collectives"] += times * exposed_s * clock_hz / 1e6
    return {part: dict(kinds) for part, kinds in sorted(sums.items(), key=lambda item: -sum(item[1].values()))}
