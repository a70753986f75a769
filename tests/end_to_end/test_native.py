"""Training at native resolution: padding has no effect, each shape compiles once in advance, resume is exact."""

import itertools
import json
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from aimv2_jax.checkpoint.checkpointer import Checkpointer
from aimv2_jax.data import pipeline
from aimv2_jax.data.transforms.geometry import patch_coords
from aimv2_jax.main import main
from aimv2_jax.train import trainer
from aimv2_jax.train.builder import TrainSetup, build_setup
from aimv2_jax.train.task import run_key
from aimv2_jax.train.tasks import build_task
from tests.helpers.programs import shared_programs  # noqa: F401
from tests.helpers.runs import assert_bitwise, saved_state
from tests.helpers.tiny import tiny_arguments, tiny_config
from tests.helpers.trained_run import random_state

pytestmark = pytest.mark.usefixtures("two_devices", "shared_programs")

SEED = 7  # With this seed both areas occur in the first four steps, and in the next four.
NATIVE = dict(model__encoder__position="sincos", data__areas=(4, 16), data__batch_size=8, eval__area=4, seed=SEED)


def make_example(grid: tuple[int, int], area: int, seed: int, config) -> dict[str, np.ndarray]:
    """Returns an example of `grid` patches padded with noise to `area`; the padding must have no effect."""
    rng, used = np.random.default_rng(seed), grid[0] * grid[1]
    patches = rng.integers(0, 256, (1, used, 588), np.uint8)
    padding = np.random.default_rng(99).integers(0, 256, (1, area - used, 588), np.uint8)
    coords = np.zeros((1, area, 2), np.int32)
    coords[0, :used] = patch_coords(grid)
    length = config.model.decoder.text_length
    return {
        "patches": np.concatenate([patches, padding], axis=1),
        "coords": coords,
        "valid": np.arange(area)[None] < used,
        "tokens": rng.integers(3, 700, (1, length), np.int32),
        "token_valid": np.arange(length)[None] < 7,
        "example_index": np.array([[0, seed]], np.uint32),
    }


@pytest.mark.parametrize("attention", ["xla", pytest.param("pallas", marks=pytest.mark.slow)])
def test_native_loss_alone_or_padded(attention):
    """Images have the same loss, gradient and prefix alone as padded beside others."""
    config = tiny_config(**NATIVE, model__attention=attention)
    task = build_task(config)
    params, grids = jax.jit(task.init)(run_key(0)), [(2, 3), (1, 6)]
    alone = [make_example(grid, grid[0] * grid[1], seed, config) for seed, grid in enumerate(grids)]
    padded = [make_example(grid, 16, seed, config) for seed, grid in enumerate(grids)]

    @jax.jit
    @partial(jax.value_and_grad, has_aux=True)
    def losses(params, batch):
        sums = task.loss(params, batch, task.sample_prefix(run_key(0), batch))
        sums = {name: term.sum for name, term in sums.items()}
        return sum(sums.values()), sums

    (_, whole), gradient = losses(params, jax.tree.map(lambda *rows: jnp.asarray(np.concatenate(rows)), *padded))
    parts = [losses(params, jax.tree.map(jnp.asarray, row)) for row in alone]
    for name, value in whole.items():
        np.testing.assert_allclose(value, sum(sums[name] for (_, sums), _ in parts), rtol=2e-6)
    expected = jax.tree.map(lambda *leaves: sum(leaves), *(gradient for _, gradient in parts))
    for ours, theirs in zip(jax.tree.leaves(gradient), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=2e-5 * float(jnp.abs(theirs).max()))


def lines_of(workdir) -> list[dict]:
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def test_native_run_compiles_each_shape_once(tmp_path, monkeypatch, capsys):
    """A run compiles each shape once, ahead of its steps, and a resumed run gives the same result."""
    compiled, compile_step = [], TrainSetup.compile_step
    monkeypatch.setattr(
        TrainSetup, "compile_step", lambda setup, shape: (compiled.append(shape), compile_step(setup, shape))[1]
    )
    frequent = dict(train__save_every=4, train__log_every=1, train__keep=5)
    settings = dict(NATIVE, **frequent, train__steps=8)
    assert main(tiny_arguments(tmp_path / "straight", **settings)) == 0
    assert compiled == [(32, 4), (8, 16)]
    output = capsys.readouterr().out
    assert output.index("of 16 patches") < output.index("step 1")
    lines = [line for line in lines_of(tmp_path / "straight") if "loss" in line]
    config = tiny_config(**settings)
    plan = pipeline.training_sampler(config, pipeline.open_sources(config).training)
    for steps in (range(4), range(4, 8)):  # Otherwise the test would be vacuous.
        assert len({plan.schedule.shape(step) for step in steps}) == 2
    assert all(0.8 <= line["patch_utilisation"] <= 1 for line in lines)
    assert main(tiny_arguments(tmp_path / "resumed", **settings | {"train__steps": 4})) == 0
    assert main(tiny_arguments(tmp_path / "resumed", **settings)) == 0
    assert_bitwise(*(saved_state(tmp_path / name, 8, **settings) for name in ("resumed", "straight")))
    last, expected = (lines_of(tmp_path / name)[-1] for name in ("resumed", "straight"))
    assert last["eval_loss"] == expected["eval_loss"]


def test_native_steps_when_one_has_run_at_each_area_then_nothing_compiles_any_more(tmp_path, caplog):
    config = tiny_config(**NATIVE)
    setup = trainer.build_setup(config)
    steps = {shape: setup.compile_step(shape) for shape in config.batch_shapes}
    state, seen = setup.init(), set()
    with pipeline.training_batches(config, range, 0) as batches, jax.log_compiles():
        for host in itertools.islice(batches, 12):
            shape = host.arrays["valid"].shape
            arrays = {name: array for name, array in host.arrays.items() if name not in pipeline.BOOKKEEPING}
            batch = pipeline.to_devices(arrays, setup.batch_sharding, range(shape[0]), shape[0])
            if seen == set(steps):
                caplog.clear()
            state, _ = steps[shape](state, batch, setup.rng)
            seen.add(shape)
    assert seen == set(steps)
    assert not [record for record in caplog.records if "Compiling" in record.getMessage()]


def test_native_run_from_learned_positions(tmp_path, capsys):
    """A native run starts from a run with a position table: it takes all but the table."""
    learned = tiny_config()
    with Checkpointer(tmp_path / "learned", keep=1) as checkpointer:
        checkpointer.save(2, random_state(build_setup(learned)), learned)
    settings = NATIVE | dict(init__path=tmp_path / "learned", eval__sources={}, train__steps=3, train__log_every=1)
    arguments = tiny_arguments(tmp_path / "native", **settings)
    assert main(arguments) == 2
    assert "encoder/position" in capsys.readouterr().err
    assert main([*arguments, "--config.init.ignore=('encoder/position',)"]) == 0
    output = capsys.readouterr().out
    assert "ignored: encoder/position" in output
    shapes = ("32 images of 4", "8 images of 16")
    assert all(f"compiling the train step for {shape} patches" in output for shape in shapes)
