"""Analysis of the TPU compiler's output for programs whose figures are known by hand."""

from __future__ import annotations

import dataclasses
import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from aimv2_jax.aot.collectives import Collectives
from aimv2_jax.aot.cost_model.cycles import CompiledCostModel, ProxyCostModel, Source
from aimv2_jax.aot.cost_model.flops import compiled_flops
from aimv2_jax.aot.cost_model.timeline import simulate
from aimv2_jax.aot.hlo import Module, parse_module, scheduled
from aimv2_jax.aot.interconnect import Layout
from aimv2_jax.aot.program import ProgramFacts, Tensor
from aimv2_jax.aot.replication import find_replicated
from aimv2_jax.parallel.hardware import CHIPS
from tests.aot import toys
from tests.helpers.tiny import TASKS, tiny_config

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None,
    reason="libtpu, the TPU compiler, is not installed: pip install -e .[tpu]",
)
V5E = CHIPS["v5e"]
BF16 = 2  # Bytes.


@pytest.fixture(scope="module")
def compiled(tmp_path_factory) -> dict[str, Module]:
    """Compiled modules of the toy programs, by name."""
    folder = tmp_path_factory.mktemp("toys")
    root = Path(__file__).parents[2]
    environment = {**os.environ, "PYTHONPATH": str(root), "XLA_FLAGS": ""}
    subprocess.run([sys.executable, toys.__file__, str(folder)], check=True, env=environment, capture_output=True)
    return {file.stem: parse_module(file.read_text()) for file in folder.glob("*.txt")}


def square() -> Layout:
    coords = np.array([(x, y) for x in range(4) for y in range(4)])
    return Layout(("data", "fsdp"), (4, 4), coords, (4, 4), 1, V5E)


def compiled_cost_model(module: Module, chip=V5E) -> CompiledCostModel:
    return CompiledCostModel(module, Collectives(module, square()), chip)


def total_cycles(module: Module, cost_model) -> float:
    return sum(
        item.times * cost_model.estimate(item.instruction, item.computation).cycles for item in scheduled(module)
    )


@pytest.mark.parametrize(("chip", "of_peak"), [("v5e", 0.88), ("v5p", 0.90)])
def test_matmul_when_alone_then_the_share_of_the_peak_that_was_counted_by_hand(compiled, chip, of_peak):
    module, flops = compiled[f"matmul_{chip}"], 2 * toys.SIDE**3
    assert compiled_flops(module) == flops
    cycles = total_cycles(module, compiled_cost_model(module, CHIPS[chip]))
    assert round(flops / cycles / CHIPS[chip].flops_per_cycle, 2) == of_peak


def test_flops_when_a_product_is_batched_then_positions_that_meet_nothing_do_not_count(compiled):
    rows, queries, heads, channels = toys.BATCHED
    text = str(compiled["batched"].computations)
    assert "lhs_dilate" in text or "pad=" in text  # Otherwise this test is vacuous.
    assert compiled_flops(compiled["batched"]) == 2 * rows * heads * queries**2 * channels


def test_scan_when_of_seven_matmuls_then_its_products_and_cycles_count_seven_times(compiled):
    module = compiled["scan"]
    assert compiled_flops(module) == toys.TRIPS * 2 * 512**3
    assert {item.times for item in scheduled(module)} == {1, toys.TRIPS}
    compiled_model = compiled_cost_model(module)
    figures = [compiled_model.estimate(item.instruction, item.computation).cycles for item in scheduled(module)]
    assert all(item.instruction.estimated_cycles is None for item in scheduled(module) if item.times == 1)
    body = sum(item.instruction.estimated_cycles or 0 for item in scheduled(module))
    assert body > 2 * 512**3 / V5E.flops_per_cycle
    assert total_cycles(module, compiled_model) == pytest.approx(toys.TRIPS * body + (sum(figures) - body), rel=1e-9)


def test_collectives_when_over_known_axes_then_bytes_axes_and_time(compiled):
    module = compiled["collectives"]
    simulated = simulate(module, Collectives(module, square()), lambda instruction, computation: 0.0)
    by_kind = {collective.kind: collective for collective, _, _ in simulated.collectives}
    assert len(simulated.collectives) == 3
    whole, part = toys.ROWS * toys.WIDTH * BF16, toys.ROWS * toys.WIDTH * BF16 // 4
    assert {kind: (collective.num_bytes, collective.axes) for kind, collective in by_kind.items()} == {
        "all-gather": (whole, ("fsdp",)),
        "reduce-scatter": (part, ("data",)),
        "collective-permute": (part, ("fsdp",)),
    }
    # v5e:4x4 has no wrap-around links: each axis is a line, and the last of four sends back over three hops.
    assert by_kind["all-gather"].route.seconds == pytest.approx(whole * 3 / 4 / 50e9)
    assert by_kind["reduce-scatter"].route.seconds == pytest.approx(part * 3 / 4 / 50e9)
    assert by_kind["collective-permute"].route.seconds == pytest.approx(3 * part / 50e9)
    assert by_kind["collective-permute"].asynchronous


def test_kernel_when_it_states_its_cost_then_that_is_charged_by_the_rule(compiled):
    module = compiled["kernel"]
    lines = module.computations[module.entry]
    estimates = [compiled_cost_model(module).estimate(instruction, module.entry) for instruction in lines]
    (kernel,) = [estimate for estimate in estimates if estimate.source is Source.KERNEL]
    seconds = max(toys.KERNEL_FLOPS / (0.5 * V5E.peak_flops), toys.KERNEL_BYTES / (0.8 * V5E.hbm_bytes_per_s))
    assert kernel.cycles == pytest.approx(seconds * V5E.clock_hz)
    assert compiled_flops(module) == toys.KERNEL_FLOPS


def test_proxy_equal_to_the_module(compiled):
    """With the module itself as its proxy, every fusion is matched and the cycles are equal."""
    module = compiled["gradient_split"]
    compiled_model = compiled_cost_model(module)
    text = {name: [_without_cycles(line) for line in lines] for name, lines in module.computations.items()}
    before = Module(text, module.entry)
    proxy = ProxyCostModel(before, compiled_cost_model(before), V5E, module, frozenset())
    assert total_cycles(before, proxy) == total_cycles(module, compiled_model) > 0
    assert all(
        proxy.estimate(item.instruction, item.computation).source is not Source.BYTES for item in scheduled(before)
    )


def _without_cycles(instruction):
    return dataclasses.replace(instruction, rest=re.sub(r'"estimated_cycles":"\d+",?', "", instruction.rest))


def facts(*parameters: tuple[str, tuple[int, ...], tuple[int, ...]]) -> ProgramFacts:
    """Returns the facts of a toy program; parameters are (name, global shape, shape of one shard)."""
    tensors = [
        Tensor(name, "parameter", list(whole), list(part), int(np.prod(part)) * 4) for name, whole, part in parameters
    ]
    return ProgramFacts({"data": 4, "fsdp": 4}, [], tensors, {}, {})


WEIGHT = ("weight", (toys.WIDTH, toys.HIDDEN), (toys.WIDTH // 4, toys.HIDDEN))


def replicated(module: Module, *parameters, changes=None, **sizes: int) -> list[str]:
    config = tiny_config(data__batch_size=toys.ROWS, model__compute_dtype="bfloat16", **changes or {})
    return find_replicated(module, Collectives(module, square()), facts(*parameters), config, **sizes)


def test_replication_when_a_gradient_is_split_then_nothing_is_found(compiled):
    assert replicated(compiled["gradient_split"], WEIGHT) == []


def test_replication_when_a_gradient_is_whole_everywhere_then_it_is_named(compiled):
    (violation,) = replicated(compiled["gradient_whole"], WEIGHT)
    assert violation.startswith("gradient of weight: ") and "[1024,2048]" in violation


def test_replication_when_rows_of_the_batch_are_whole_everywhere_then_the_activation_is_named(compiled):
    violations = replicated(compiled["activation_whole"], WEIGHT)
    assert any("tanh: 4096 rows" in line for line in violations), violations


def test_replication_of_embeddings_in_a_contrastive_loss(compiled):
    """Embeddings of all pairs and gradients of what computes them are whole everywhere; other arrays are named."""
    lit = TASKS["lit"] | {"lit__embed_dim": toys.HIDDEN}
    others = {"lit__embed_dim": toys.HIDDEN + 1}
    named = [replicated(compiled["activation_whole"], WEIGHT, changes=each) for each in (lit, lit | others)]
    assert [any("activation" in line for line in lines) for lines in named] == [False, True]
    _, *shapes = WEIGHT
    gradient = compiled["gradient_whole"]
    assert replicated(gradient, ("params/image_projection/kernel", *shapes), changes=lit) == []
    assert len(replicated(gradient, ("params/text/kernel", *shapes), changes=lit)) == 1


def test_replication_when_a_parameter_enters_or_leaves_whole_then_it_is_named(compiled):
    name, whole, part = WEIGHT
    halves = (name, whole, (part[0] // 2, part[1]))
    violations = replicated(compiled["gradient_split"], halves)
    assert [line.split(" as ")[0] for line in violations[:2]] == ["parameter weight enters", "parameter weight leaves"]
    unsplit = (name, part, part)
    assert replicated(compiled["gradient_split"], unsplit) == []  # Small enough to stay unsplit.
    (violation,) = replicated(compiled["gradient_split"], unsplit, min_unsplit_bytes=2**20)
    assert "no rule splits it" in violation
