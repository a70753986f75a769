"""Compiles a train step and predicts its memory, time and communication."""

from __future__ import annotations

import dataclasses
from typing import Any

from aimv2_jax.aot import tables
from aimv2_jax.aot.collectives import Collectives
from aimv2_jax.aot.compiler import compile_step
from aimv2_jax.aot.cost_model.cycles import CompiledCostModel, ProxyCostModel
from aimv2_jax.aot.cost_model.flops import compiled_flops
from aimv2_jax.aot.cost_model.timeline import simulate
from aimv2_jax.aot.hlo import parse_module, scheduled
from aimv2_jax.aot.interconnect import layout_of
from aimv2_jax.aot.prediction import Figures, Refusal
from aimv2_jax.aot.program import AotProgram
from aimv2_jax.aot.replication import find_replicated
from aimv2_jax.aot.topology import Topology
from aimv2_jax.config.schema import Config
from aimv2_jax.monitoring.flops import flops_per_example
from aimv2_jax.monitoring.model_flops import flops_of_allowed_pairs

GIB = 2**30
# Two layers (a first and a last), so that fusions across layers occur in the proxy too.
_PROXY_DEPTH = 2


def predict_step(config: Config, topology: Topology, full: bool) -> Figures | Refusal:
    """Compiles the train step of a config and predicts its figures.

    With `full`, the code of the whole step is generated; otherwise that of a proxy with few layers.
    """
    program = compile_step(config, topology, full)
    if program.refusal or full:
        return predict(config, topology, program)
    return predict(config, topology, program, compile_step(proxy_config(config), topology, full=True))


def proxy_config(config: Config) -> Config:
    """Returns `config` with few layers in every trunk."""

    def shallow(trunk: Any) -> Any:
        return trunk and dataclasses.replace(trunk, depth=min(_PROXY_DEPTH, trunk.depth))

    model, lit, distill = config.model, config.lit, config.distill
    model = dataclasses.replace(model, encoder=shallow(model.encoder), decoder=shallow(model.decoder))
    lit = dataclasses.replace(lit, text=shallow(lit.text))
    distill = dataclasses.replace(distill, encoder=shallow(distill.encoder), decoder=shallow(distill.decoder))
    return dataclasses.replace(config, model=model, lit=lit, distill=distill)


def _stack_depths(config: Config) -> frozenset[int]:
    return frozenset(trunk.depth for trunk in config.trunks.values())


def predict(
    config: Config, topology: Topology, program: AotProgram, proxy: AotProgram | None = None
) -> Figures | Refusal:
    """Predicts the figures of a compiled step. `proxy` supplies cycles if `program` has no code generation."""
    chip = topology.chip
    shape = config.batch_shapes[0]
    # Everything below is per device, as the compiler's program and its memory are.
    model_flops = flops_per_example(config, shape.patches) * shape.examples / topology.num_devices
    common = {
        "hbm_limit_gib": chip.hbm_limit_bytes / GIB,
        "model_tflops_per_chip": model_flops * chip.devices / 1e12,
        "versions": program.facts.versions,
        "mesh": program.facts.mesh,
        "num_chips": topology.num_chips,
        "batch_size": shape.examples,
        "patches": shape.patches,
    }
    if refusal := program.refusal or (proxy and proxy.refusal):
        return Refusal(refusal=refusal, **common)
    module = parse_module(program.text)
    collectives = Collectives(module, layout_of(program.facts, topology))
    cost_model = CompiledCostModel(module, collectives, chip)
    if proxy:
        depths = _stack_depths(config) | _stack_depths(proxy_config(config))
        cost_model = ProxyCostModel(module, cost_model, chip, parse_module(proxy.text), depths)
    timing = simulate(
        module,
        collectives,
        lambda instruction, computation: cost_model.estimate(instruction, computation).cycles / chip.clock_hz,
    )
    costs = [(item, cost_model.estimate(item.instruction, item.computation)) for item in scheduled(module)]
    pairs_flops = flops_of_allowed_pairs(config) * shape.examples / topology.num_devices
    flops = compiled_flops(module)
    step_s = timing.with_overlap_s
    steps = config.train.steps

    def mfu(flops: float, seconds: float) -> float:
        return flops / (seconds * chip.peak_flops)

    return Figures(
        **common,
        hbm_gib=program.hbm_bytes / GIB,
        hbm_spare=1 - program.hbm_bytes / chip.hbm_limit_bytes,
        hbm_parts_gib=_memory_by_purpose(program),
        model_tflops_per_chip_of_allowed_pairs=pairs_flops * chip.devices / 1e12,
        compiled_tflops_per_chip=flops * chip.devices / 1e12,
        recompute=flops / model_flops - 1,
        predicted_mcycles=timing.compute_s * chip.clock_hz / 1e6,
        predicted_compute_ms=timing.compute_s * 1e3,
        predicted_ms_without_overlap=timing.without_overlap_s * 1e3,
        predicted_ms=step_s * 1e3,
        predicted_mfu=mfu(model_flops, timing.compute_s),
        predicted_mfu_of_allowed_pairs=mfu(pairs_flops, timing.compute_s),
        predicted_mfu_without_overlap=mfu(model_flops, timing.without_overlap_s),
        predicted_mfu_with_comms=mfu(model_flops, step_s),
        images_per_s=shape.examples / step_s,
        steps=steps,
        days=steps * step_s / 86400,
        chip_hours=steps * step_s / 3600 * topology.num_chips,
        collectives=tables.collective_totals(timing),
        gradient_dtypes=tables.gradient_dtypes(timing),
        between_slices=tables.slice_traffic(timing),
        replicated=find_replicated(module, collectives, program.facts, config),
        cycles_from=tables.cycle_sources(costs),
        kernels=tables.kernel_totals(costs),
        top=tables.top_operations(module, costs, chip.flops_per_cycle),
        breakdown=tables.breakdown(module, costs, timing, chip.clock_hz),
        compiler_options=program.facts.compiler_options,
        compile_s=program.seconds + (proxy.seconds if proxy else 0),
    )


def _memory_by_purpose(program: AotProgram) -> dict[str, float]:
    """Returns GiB on one device. Activations are everything but state and batch: temporaries of the step."""
    facts = program.facts
    parts = {
        "parameters": facts.bytes_of("parameter"),
        "optimiser": facts.bytes_of("optimiser"),
        "batch": facts.bytes_of("batch"),
    }
    parts["activations"] = program.hbm_bytes - sum(parts.values())
    return {name: num_bytes / GIB for name, num_bytes in parts.items()}
