"""The rule table determines every parameter's sharding in every preset, and every rule is used."""

from __future__ import annotations

from pathlib import Path

import jax
import pytest
from jax.sharding import PartitionSpec

from aimv2_jax.config.load import load_config
from aimv2_jax.errors import UserError
from aimv2_jax.parallel import rules
from aimv2_jax.train.builder import build_setup
from experiments.pretrain import SIZES
from tests.helpers.golden_names import paths
from tests.helpers.tiny import ROOT, tiny_config

GOLDEN = Path(__file__).parents[1] / "golden_configs/shardings.txt"
PRETRAIN = ROOT / "experiments/pretrain.py"
MESH = [("mesh.data", "2"), ("mesh.fsdp", "2"), ("mesh.tensor", "2")]
ACTIVATIONS = {"batch", "length", "activation"}


def table(size: str) -> str:
    """Lists every parameter with its shape, logical axes and mesh axes, one per line."""
    config = load_config(f"{PRETRAIN}:{size}", MESH)
    setup = build_setup(config)
    shapes, names = paths(setup.abstract_state.params), paths(setup.task.logical_axes())
    shardings = paths(setup.state_shardings.params)
    return "".join(
        f"{path} {tuple(shape.shape)} {tuple(names[path])} {tuple(shardings[path].spec)}\n"
        for path, shape in shapes.items()
    )


@pytest.mark.parametrize("size", SIZES)
def test_rule_table_when_resolved_for_a_preset_then_every_line_matches_and_is_used(size):
    setup = build_setup(load_config(f"{PRETRAIN}:{size}", MESH))
    axes = paths(setup.task.logical_axes())
    used = {name for names in axes.values() for name in names}
    rule_names = {name for name, _ in rules.RULES}
    assert used | ACTIVATIONS == rule_names
    for path, sharding in paths(setup.state_shardings.params).items():
        lookup = dict(rules.RULES)
        assert sharding.spec == PartitionSpec(*(lookup[name] for name in axes[path])), path


def test_rule_table_when_printed_for_large_then_equals_the_golden_text():
    text = table("large")
    print(text)
    assert text == GOLDEN.read_text(), (
        "shardings have changed; if that is intended, run python -m tests.write_golden_configs"
    )


def test_parameters_when_a_name_has_no_rule_then_refused():
    with pytest.raises(AssertionError, match="colour"):
        rules.param_shardings({"x": PartitionSpec("colour")}, build_setup(tiny_config()).mesh)


def test_parameters_when_the_mesh_cannot_split_them_then_refused_naming_one():
    config = tiny_config(model__decoder__hidden=33, mesh__tensor=2)
    with pytest.raises(
        UserError, match=r"decoder/trunk/blocks/mlp/down/kernel.*mesh\.fsdp x mesh\.tensor.*33 entries, 2 devices"
    ):
        _ = build_setup(config).state_shardings


def test_state_when_initialised_on_any_mesh_then_same_numbers_laid_out_as_the_rules_say():
    setups = [
        build_setup(tiny_config(mesh__data=d, mesh__fsdp=f, mesh__tensor=t)) for d, f, t in [(8, 1, 1), (2, 2, 2)]
    ]
    states = [setup.init() for setup in setups]
    for setup, state in zip(setups, states):
        for leaf, sharding in zip(jax.tree.leaves(state), jax.tree.leaves(setup.state_shardings)):
            assert leaf.sharding.is_equivalent_to(sharding, leaf.ndim)
    for a, b in zip(*map(jax.tree.leaves, states)):
        assert (jax.device_get(a) == jax.device_get(b)).all()
    moments = [leaf.sharding for leaf in jax.tree.leaves(states[1].opt_state) if leaf.ndim]
    param_shardings = [leaf.sharding for leaf in jax.tree.leaves(states[1].params)] * 2
    assert moments == param_shardings
