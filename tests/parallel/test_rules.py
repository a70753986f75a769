"""The rule table: every parameter of every preset has its sharding from it, and every line of it is used."""

from __future__ import annotations

from pathlib import Path

import jax
import pytest
from golden_names import paths
from jax.sharding import PartitionSpec
from tiny import ROOT, tiny_config

from aimv2_jax.config import load_config
from aimv2_jax.errors import UserError
from aimv2_jax.parallel import rules
from aimv2_jax.train.program import build_program
from aimv2_jax.train.task import build_task, run_key

GOLDEN = Path(__file__).parents[1] / "golden_configs/shardings.txt"
PRESETS = sorted(path.stem for path in (ROOT / "experiments").glob("pretrain_*.py"))
MESH = [("mesh.data", "2"), ("mesh.fsdp", "2"), ("mesh.tensor", "2")]
ACTIVATIONS = {"batch", "length", "activation"}


def table(preset: str) -> str:
    """Every parameter with its shape, logical axes and mesh axes, a line each."""
    config = load_config(ROOT / f"experiments/{preset}.py", MESH)
    program = build_program(config)
    shapes, names = paths(program.abstract_state.params), paths(program.task.logical_axes())
    shardings = paths(program.state_shardings.params)
    return "".join(
        f"{path} {tuple(shape.shape)} {tuple(names[path])} {tuple(shardings[path].spec)}\n" for path, shape in shapes.items()
    )


@pytest.mark.parametrize("preset", PRESETS)
def test_rule_table_when_resolved_for_a_preset_then_every_line_matches_and_is_used(preset):
    program = build_program(load_config(ROOT / f"experiments/{preset}.py", MESH))
    axes = paths(program.task.logical_axes())
    used = {name for names in axes.values() for name in names}
    known = {name for name, _ in rules.RULES}
    assert used | ACTIVATIONS == known
    for path, sharding in paths(program.state_shardings.params).items():
        lookup = dict(rules.RULES)
        assert sharding.spec == PartitionSpec(*(lookup[name] for name in axes[path])), path


def test_rule_table_when_printed_for_large_then_equals_the_golden_text():
    text = table("pretrain_large_224")
    print(text)
    assert text == GOLDEN.read_text(), "shardings have changed; if that is meant, run python -m tests.write_golden_configs"


def test_parameters_when_a_name_has_no_rule_then_refused():
    with pytest.raises(AssertionError, match="colour"):
        rules.param_shardings({"x": PartitionSpec("colour")}, build_program(tiny_config()).mesh)


def test_parameters_when_the_mesh_cannot_split_them_then_refused_naming_one():
    config = tiny_config(model__decoder__hidden=30, mesh__tensor=4)
    with pytest.raises(UserError, match=r"decoder/trunk/blocks/mlp/down/kernel.*mesh\.tensor.*30 entries, 4 devices"):
        _ = build_program(config).state_shardings


def test_state_when_initialised_on_any_mesh_then_same_numbers_laid_out_as_the_rules_say():
    programs = [build_program(tiny_config(mesh__data=d, mesh__fsdp=f, mesh__tensor=t)) for d, f, t in [(8, 1, 1), (2, 2, 2)]]
    states = [program.init() for program in programs]
    for program, state in zip(programs, states):
        for leaf, sharding in zip(jax.tree.leaves(state), jax.tree.leaves(program.state_shardings)):
            assert leaf.sharding.is_equivalent_to(sharding, leaf.ndim)
    for one, other in zip(*map(jax.tree.leaves, states)):
        assert (jax.device_get(one) == jax.device_get(other)).all()
    moments = [leaf.sharding for leaf in jax.tree.leaves(states[1].opt_state) if leaf.ndim]
    follow = [leaf.sharding for leaf in jax.tree.leaves(states[1].params)] * 2
    assert moments == follow


def test_init_when_drawn_by_the_recipe_then_each_tensor_has_its_distribution():
    """RECIPE.md §5, on a model wide enough to tell distributions apart."""
    config = load_config(ROOT / "experiments/pretrain_base_224.py", [("model.encoder.depth", "2")])
    params = paths(jax.jit(build_task(config).init)(run_key(0)))
    depth = config.model.decoder.depth

    def check(path: str, std: float, bound: float):
        leaf = params[path]
        assert abs(float(leaf.std()) / std - 1) < 0.05 and abs(float(leaf.mean())) < 0.05 * std, path
        assert bound * 0.9 < float(abs(leaf).max()) <= bound * 1.0001, path

    def uniform(path: str, bound: float):
        check(path, bound / 3**0.5, bound)

    def xavier(path: str):
        fan_in, fan_out = params[path].shape[-2:]
        uniform(path, (6 / (fan_in + fan_out)) ** 0.5)

    for trunk in ("encoder/trunk", "decoder/trunk"):
        for name in ("attention/query", "attention/key", "attention/value", "attention/out", "mlp/gate", "mlp/up", "mlp/down"):
            xavier(f"{trunk}/blocks/{name}/kernel")
        stacked = params[f"{trunk}/blocks/mlp/up/kernel"]
        assert (stacked[0] != stacked[1]).any()  # every layer has its own draw
    xavier("encoder/patch_embed/kernel")
    uniform("encoder/patch_embed/bias", 1 / 588**0.5)
    uniform("decoder/image_embed/kernel", 1 / 768**0.5)
    uniform("decoder/image_embed/bias", 1 / 768**0.5)
    for path, std in {
        "encoder/position": 0.02,
        "decoder/token_table": 0.02,
        "decoder/begin": 0.02,
        "decoder/position": 0.01,
    }.items():
        assert abs(float(params[path].std()) / std - 1) < 0.1, path
    for head in ("pixel_head", "token_head"):
        std = (1 / ((1 + depth) * 1024)) ** 0.5
        check(f"decoder/{head}/kernel", std, 2 * std / 0.87962566103423978)  # cut at two of the untruncated sigmas
    assert all((leaf == 1).all() for path, leaf in params.items() if path.endswith("scale"))
