"""The compiler's own text, of programs whose figures can be counted by hand."""

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
from aot import toys
from tiny import tiny_config

from aimv2_jax.aot.chips import CHIPS
from aimv2_jax.aot.collectives import Collectives
from aimv2_jax.aot.cycles import OwnCharges, Source, TwinCharges
from aimv2_jax.aot.flops import compiled_flops
from aimv2_jax.aot.hlo import Module, parse_module
from aimv2_jax.aot.interconnect import Layout
from aimv2_jax.aot.replication import find_replicated
from aimv2_jax.aot.schedule import scheduled
from aimv2_jax.aot.timeline import play

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None,
    reason="libtpu, the TPU compiler, is not installed: pip install -e .[tpu]",
)
V5E = CHIPS["v5e"]
BF16 = 2  # Bytes.


@pytest.fixture(scope="module")
def compiled(tmp_path_factory) -> dict[str, Module]:
    """The toys' modules by name."""
    folder = tmp_path_factory.mktemp("toys")
    root = Path(__file__).parents[2]
    environment = {**os.environ, "PYTHONPATH": str(root), "XLA_FLAGS": ""}
    subprocess.run([sys.executable, toys.__file__, str(folder)], check=True, env=environment, capture_output=True)
    return {file.stem: parse_module(file.read_text()) for file in folder.glob("*.txt")}


def square() -> Layout:
    coords = np.array([(x, y) for x in range(4) for y in range(4)])
    return Layout(("data", "fsdp"), (4, 4), coords, (4, 4), 1, V5E)


def own_charges(module: Module, chip=V5E) -> OwnCharges:
    return OwnCharges(module, Collectives(module, square()), chip)


def total_cycles(module: Module, charges) -> float:
    return sum(each.times * charges.of(each.instruction, each.computation).cycles for each in scheduled(module))


@pytest.mark.parametrize(("chip", "of_peak"), [("v5e", 0.88), ("v5p", 0.90)])
def test_matmul_when_alone_then_the_share_of_the_peak_that_was_counted_by_hand(compiled, chip, of_peak):
    module, flops = compiled[f"matmul_{chip}"], 2 * toys.SIDE**3
    assert compiled_flops(module) == flops
    cycles = total_cycles(module, own_charges(module, CHIPS[chip]))
    assert round(flops / cycles / CHIPS[chip].flops_per_cycle, 2) == of_peak


def test_flops_when_a_product_is_batched_then_positions_that_meet_nothing_do_not_count(compiled):
    rows, queries, heads, channels = toys.BATCHED
    text = str(compiled["batched"].computations)
    assert "lhs_dilate" in text or "pad=" in text  # Else this tests nothing.
    assert compiled_flops(compiled["batched"]) == 2 * rows * heads * queries**2 * channels


def test_scan_when_of_seven_matmuls_then_its_products_and_cycles_count_seven_times(compiled):
    module = compiled["scan"]
    assert compiled_flops(module) == toys.TRIPS * 2 * 512**3
    assert {each.times for each in scheduled(module)} == {1, toys.TRIPS}
    own = own_charges(module)
    figures = [own.of(each.instruction, each.computation).cycles for each in scheduled(module)]
    assert all(each.instruction.estimated_cycles is None for each in scheduled(module) if each.times == 1)
    body = sum(each.instruction.estimated_cycles or 0 for each in scheduled(module))
    assert body > 2 * 512**3 / V5E.flops_per_cycle
    assert total_cycles(module, own) == pytest.approx(toys.TRIPS * body + (sum(figures) - body), rel=1e-9)


def test_collectives_when_over_known_axes_then_bytes_axes_and_time(compiled):
    module = compiled["collectives"]
    played = play(module, Collectives(module, square()), lambda one, computation: 0.0)
    found = {one.kind: one for one, _, _ in played.collectives}
    assert len(played.collectives) == 3
    whole, part = toys.ROWS * toys.WIDTH * BF16, toys.ROWS * toys.WIDTH * BF16 // 4
    assert {kind: (one.num_bytes, one.axes) for kind, one in found.items()} == {
        "all-gather": (whole, ("fsdp",)),
        "reduce-scatter": (part, ("data",)),
        "collective-permute": (part, ("fsdp",)),
    }
    # v5e:4x4 has no wrap-around: lines of one link, on which the last of four sends back over three hops.
    assert found["all-gather"].route.seconds == pytest.approx(whole * 3 / 4 / 50e9)
    assert found["reduce-scatter"].route.seconds == pytest.approx(part * 3 / 4 / 50e9)
    assert found["collective-permute"].route.seconds == pytest.approx(3 * part / 50e9)
    assert found["collective-permute"].asynchronous


def test_kernel_when_it_states_its_cost_then_that_is_charged_by_the_rule(compiled):
    module = compiled["kernel"]
    charged = [own_charges(module).of(one, module.entry) for one in module.computations[module.entry]]
    (kernel,) = [charge for charge in charged if charge.source is Source.KERNEL]
    seconds = max(toys.KERNEL_FLOPS / (0.5 * V5E.peak_flops), toys.KERNEL_BYTES / (0.8 * V5E.hbm_bytes_per_s))
    assert kernel.cycles == pytest.approx(seconds * V5E.clock_hz)
    assert compiled_flops(module) == toys.KERNEL_FLOPS


def test_twin_when_it_is_the_module_itself_then_every_figure_is_found(compiled):
    module = compiled["gradient_split"]
    own = own_charges(module)
    text = {name: [_without_cycles(one) for one in lines] for name, lines in module.computations.items()}
    before = Module(text, module.entry)
    twin = TwinCharges(before, own_charges(before), V5E, module, frozenset())
    assert total_cycles(before, twin) == total_cycles(module, own) > 0
    assert all(twin.of(each.instruction, each.computation).source is not Source.BYTES for each in scheduled(before))


def _without_cycles(one):
    return dataclasses.replace(one, rest=re.sub(r'"estimated_cycles":"\d+",?', "", one.rest))


def facts(*parameters: tuple[str, tuple[int, ...], tuple[int, ...]]) -> dict:
    """What a worker would say of a toy program: parameters as (name, whole, one device's part)."""
    tensors = [
        {"name": name, "kind": "parameter", "shape": list(whole), "part": list(part), "bytes": int(np.prod(part)) * 4}
        for name, whole, part in parameters
    ]
    return {"axes": ["data", "fsdp"], "shape": [4, 4], "tensors": tensors, "batch_size": toys.ROWS}


WEIGHT = ("weight", (toys.WIDTH, toys.HIDDEN), (toys.WIDTH // 4, toys.HIDDEN))


def replicated(module: Module, *parameters, **sizes: int) -> list[str]:
    config = tiny_config(data__batch_size=toys.ROWS, model__compute_dtype="bfloat16")
    return find_replicated(module, Collectives(module, square()), facts(*parameters), config, **sizes)


def test_replication_when_a_gradient_is_split_then_nothing_is_found(compiled):
    assert replicated(compiled["gradient_split"], WEIGHT) == []


def test_replication_when_a_gradient_is_whole_everywhere_then_it_is_named(compiled):
    (found,) = replicated(compiled["gradient_whole"], WEIGHT)
    assert found.startswith("gradient of weight: ") and "[1024,2048]" in found


def test_replication_when_rows_of_the_batch_are_whole_everywhere_then_the_activation_is_named(compiled):
    found = replicated(compiled["activation_whole"], WEIGHT)
    assert any("tanh: 4096 rows" in line for line in found), found


def test_replication_when_a_parameter_enters_or_leaves_whole_then_it_is_named(compiled):
    name, whole, part = WEIGHT
    halves = (name, whole, (part[0] // 2, part[1]))
    found = replicated(compiled["gradient_split"], halves)
    assert [line.split(" as ")[0] for line in found[:2]] == ["parameter weight enters", "parameter weight leaves"]
    unsplit = (name, part, part)
    assert replicated(compiled["gradient_split"], unsplit) == []  # Small enough to be left whole.
    (found,) = replicated(compiled["gradient_split"], unsplit, whole=2**20)
    assert "no rule splits it" in found
