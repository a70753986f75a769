"""From a compiled module to the figures of a report. All of them are predictions."""

from __future__ import annotations

import dataclasses
import re
from collections import defaultdict
from typing import Any

from aimv2_jax.aot.collectives import BETWEEN_SLICES, Collective, Collectives
from aimv2_jax.aot.compiling import Compiled
from aimv2_jax.aot.cycles import Charges, OwnCharges, Source, TwinCharges
from aimv2_jax.aot.flops import compiled_flops, flops_of
from aimv2_jax.aot.hlo import Module, parse_module
from aimv2_jax.aot.interconnect import layout_of
from aimv2_jax.aot.kernels import target_of
from aimv2_jax.aot.memory import GIB, read_memory
from aimv2_jax.aot.parts import Parts
from aimv2_jax.aot.replication import find_replicated
from aimv2_jax.aot.schedule import scheduled
from aimv2_jax.aot.timeline import Played, play
from aimv2_jax.aot.topology import Topology
from aimv2_jax.config import Config

TOP = 20
_SCALARS = 2**14  # Bytes: what losses, counts and norms of a step may come to in one message between slices.


@dataclasses.dataclass(frozen=True)
class Twin:
    """A shallow compile with cycles, and the depths that stacks have in it and in the whole."""

    compiled: Compiled
    depths: frozenset[int]


def predict(config: Config, topology: Topology, compiled: Compiled, twin: Twin | None) -> dict[str, Any]:
    """Every figure of a report, as JSON has it; `twin` where the step itself was compiled without code generation."""
    chip, program = topology.chip, compiled.program
    module = parse_module(compiled.text)
    collectives = Collectives(module, layout_of(program, chip, topology.shape))
    charges: Charges = OwnCharges(module, collectives, chip)
    if twin:
        charges = TwinCharges(module, charges, chip, parse_module(twin.compiled.text), twin.depths)
    played = play(module, collectives, lambda one, computation: charges.of(one, computation).cycles / chip.clock_hz)
    memory = read_memory(program, compiled.hbm_bytes, chip.hbm_limit_bytes)
    model_flops = program["flops_per_example"] * program["batch_size"] / program["num_chips"]
    pairs_flops = program["flops_of_allowed_pairs"] * program["batch_size"] / program["num_chips"]
    flops = compiled_flops(module)

    def utilisation(seconds: float) -> float:
        return model_flops / (seconds * chip.peak_flops)

    step_s, steps = played.with_overlap_s, program["steps"]
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
        "predicted_mcycles": played.compute_s * chip.clock_hz / 1e6,
        "predicted_compute_ms": played.compute_s * 1e3,
        "predicted_ms_without_overlap": played.without_overlap_s * 1e3,
        "predicted_ms": step_s * 1e3,
        "predicted_mfu": utilisation(played.compute_s),
        "predicted_mfu_of_allowed_pairs": pairs_flops / (played.compute_s * chip.peak_flops),
        "predicted_mfu_without_overlap": utilisation(played.without_overlap_s),
        "predicted_mfu_with_comms": utilisation(step_s),
        "images_per_s": program["batch_size"] / step_s,
        "steps": steps,
        "days": steps * step_s / 86400,
        "chip_hours": steps * step_s / 3600 * program["num_chips"],
        "collectives": _collectives(played),
        "gradient_dtypes": _gradient_dtypes(played),
        "between_slices": _between_slices(played),
        "replicated": find_replicated(module, collectives, program, config),
        "cycles_from": _sources(module, charges),
        "kernels": _kernels(module, charges),
        "top": _top(module, charges, chip.flops_per_cycle),
        "breakdown": _breakdown(module, charges, played, chip.clock_hz),
        "versions": program["versions"],
        "compiler_options": program["compiler_options"],
        "mesh": dict(zip(program["axes"], program["shape"])),
        "num_chips": program["num_chips"],
        "batch_size": program["batch_size"],
        "patches": program["patches"],
        "compile_s": compiled.seconds + (twin.compiled.seconds if twin else 0),
    }


def refused(compiled: Compiled, topology: Topology) -> dict[str, Any]:
    """What is left to say of a step that does not compile."""
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


def _collectives(played: Played) -> list[dict[str, Any]]:
    """By kind, mesh axes, element types and way: counts, bytes, milliseconds alone and exposed."""
    sums: dict[tuple, list[float]] = defaultdict(lambda: [0, 0, 0, 0])
    for one, times, exposed_s in played.collectives:
        types = ", ".join(sorted({text.partition("[")[0] for text in one.arrays})) or "scalars"
        row = sums[(one.kind, " x ".join(one.axes) or "none", types, one.asynchronous)]
        for place, value in enumerate((1, one.num_bytes, one.route.seconds * 1e3, exposed_s * 1e3)):
            row[place] += times * value
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


def _is_gradient(one: Collective) -> bool:
    return "transpose(" in one.op_name


def _gradient_dtypes(played: Played) -> dict[str, int]:
    """Bytes of gradients reduced over devices, by element type: what the config's reduction type became."""
    found: dict[str, int] = defaultdict(int)
    for one, times, _ in played.collectives:
        if one.kind.startswith(("reduce-scatter", "all-reduce")) and one.num_bytes > _SCALARS:
            for text in {text.partition("[")[0] for text in one.arrays}:
                found[text] += times * one.num_bytes
    return dict(sorted(found.items(), key=lambda item: -item[1]))


def _between_slices(played: Played) -> list[dict[str, Any]]:
    """What crosses slices: gradients, sums of losses and counts, or something that should not."""
    sums: dict[tuple[str, str], list[int]] = defaultdict(lambda: [0, 0])
    for one, times, _ in played.collectives:
        if BETWEEN_SLICES not in one.kind:
            continue
        if _is_gradient(one) and "all-reduce" in one.kind:
            carries = "gradients"
        elif one.num_bytes <= _SCALARS:
            carries = "losses, counts and norms"
        else:
            carries = f"other: {one.op_name or ', '.join(one.arrays)}"
        row = sums[(one.kind, carries)]
        row[0] += times
        row[1] += times * one.num_bytes
    return [
        {"kind": kind, "carries": carries, "count": count, "bytes": num_bytes}
        for (kind, carries), (count, num_bytes) in sums.items()
    ]


def _sources(module: Module, charges: Charges) -> dict[str, float]:
    """The share of the cycles that came from each source."""
    sums: dict[Source, float] = defaultdict(float)
    for each in scheduled(module):
        charge = charges.of(each.instruction, each.computation)
        sums[charge.source] += each.times * charge.cycles
    total = sum(sums.values()) or 1.0
    return {source.value: cycles / total for source, cycles in sums.items() if cycles}


def _kernels(module: Module, charges: Charges) -> list[dict[str, Any]]:
    """What was charged by the rule for kernels, by name."""
    sums: dict[tuple[str, bool], list[float]] = defaultdict(lambda: [0, 0.0])
    for each in scheduled(module):
        one, charge = each.instruction, charges.of(each.instruction, each.computation)
        if charge.source in (Source.KERNEL, Source.BYTES):
            pallas = target_of(one) == "tpu_custom_call"
            row = sums[(re.sub(r"[.\d]+$", "", one.name), pallas and '"cost_estimate"' in one.rest)]
            row[0] += each.times
            row[1] += each.times * charge.cycles / 1e6
    return [
        {"name": name, "states_its_cost": stated, "count": int(count), "mcycles": mcycles}
        for (name, stated), (count, mcycles) in sorted(sums.items(), key=lambda item: -item[1][1])
    ]


def _top(module: Module, charges: Charges, flops_per_cycle: float) -> list[dict[str, Any]]:
    """The most expensive operations: same name in the trace and same shape are one."""
    sums: dict[tuple[str, str, str], list[float]] = defaultdict(lambda: [0, 0.0, 0.0])
    counted: dict[str, float] = {}
    parts = Parts(module)
    for each in scheduled(module):
        one = each.instruction
        cycles = charges.of(one, each.computation).cycles
        if not cycles:
            continue
        shape = re.sub(r"\{[^{}]*\}", "", one.shape).split(", bf16[1,")[0].split(", s32[2]")[0]
        row = sums[(parts.part(one), _short(one.op_name) or re.sub(r"[.\d]+$", "", one.name), shape[:60])]
        row[0] += each.times
        row[1] += each.times * cycles
        row[2] += each.times * flops_of(one, each.computation, module, counted)
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
    """The last pieces of a traced name, forward or backward."""
    backward = "backward: " if "transpose(" in op_name else ""
    pieces = [piece for piece in op_name.partition(";")[0].split("/") if "(" not in piece]
    return backward + "/".join(pieces[-3:]) if pieces else ""


def _breakdown(module: Module, charges: Charges, played: Played, clock_hz: float) -> dict[str, dict[str, float]]:
    """Megacycles by part of the model and kind of instruction; collectives as the time that nothing hid."""
    parts = Parts(module)
    sums: dict[str, dict[str, float]] = defaultdict(lambda: defaultdict(float))
    for each in scheduled(module):
        cycles = charges.of(each.instruction, each.computation).cycles
        if cycles:
            sums[parts.part(each.instruction)][parts.kind(each.instruction)] += each.times * cycles / 1e6
    for one, times, exposed_s in played.collectives:
        if exposed_s:
            sums[parts.part_of(one.op_name)]["exposed collectives"] += times * exposed_s * clock_hz / 1e6
    return {part: dict(kinds) for part, kinds in sorted(sums.items(), key=lambda item: -sum(item[1].values()))}
