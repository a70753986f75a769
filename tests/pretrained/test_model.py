import jax
import numpy as np
import pytest

from aimv2_jax.checkpoint.checkpointer import CheckpointReader
from aimv2_jax.errors import UserError
from aimv2_jax.models.position_embeddings import resize_positions
from aimv2_jax.pretrained.model import Resolution, load


def test_load_when_given_a_workdir_then_the_best_step_with_config_and_parameters(workdir, config, state):
    loaded = load(str(workdir))
    assert (loaded.workdir, loaded.step, loaded.config) == (str(workdir), 20, config)
    assert loaded.name == f"{workdir}:20"
    jax.tree.map(np.testing.assert_array_equal, loaded.params, state.params)


def test_load_when_on_eight_devices_then_parameters_whole_on_each_and_rows_split(workdir):
    loaded = load(f"{workdir}:last")
    assert loaded.step == 40
    best = load(str(workdir)).params
    jax.tree.map(lambda last, best: np.testing.assert_array_equal(last, 2 * best), loaded.params, best)
    assert jax.device_count() == 8
    for leaf in jax.tree.leaves(loaded.params):
        assert len(leaf.sharding.device_set) == 8 and leaf.sharding.is_fully_replicated
    assert loaded.put(np.zeros((16, 3))).addressable_shards[0].data.shape == (2, 3)
    assert loaded.put({"odd": np.zeros((5, 3))})["odd"].addressable_shards[0].data.shape == (5, 3)


@pytest.mark.parametrize("spec", ["{}:30", "{}/none"])
def test_load_checkpoint_missing(workdir, spec):
    """A checkpoint that does not exist raises UserError."""
    with pytest.raises(UserError, match="--checkpoint"):
        load(spec.format(workdir))


def test_load_config_of_another_version(workdir, monkeypatch):
    """A saved config with a key of another version raises UserError that names the checkpoint."""
    meta = CheckpointReader(workdir).meta(20)
    monkeypatch.setattr(CheckpointReader, "meta", lambda *_: {**meta, "config": {**meta["config"], "new": 1}})
    with pytest.raises(UserError, match=r"checkpoint .*:20 does not fit this version of aimv2_jax.*'new'"):
        load(str(workdir))


def test_load_config_of_an_earlier_version(workdir, monkeypatch):
    """A saved config that lacks a key added since is that of a run without it."""
    meta = CheckpointReader(workdir).meta(20)
    train = {key: value for key, value in meta["config"]["train"].items() if key != "gpu_compiler_options"}
    earlier = {**meta, "config": {**meta["config"], "train": train}}
    monkeypatch.setattr(CheckpointReader, "meta", lambda *_: earlier)
    assert load(str(workdir)).config.train.gpu_compiler_options == {}


def test_model_at_another_resolution(workdir):
    """A model at another resolution has resized positions, and no other parameter differs."""
    loaded = load(str(workdir))
    larger = loaded.at_resolution(Resolution(48))
    assert (larger.config.grid, larger.task.model.encoder.num_patches) == ((6, 6), 36)
    expected = resize_positions(loaded.params["encoder"]["position"], (4, 4), (6, 6))
    np.testing.assert_array_equal(larger.params["encoder"]["position"], expected)

    def without_positions(params):
        return {**params, "encoder": {**params["encoder"], "position": None}}

    jax.tree.map(np.testing.assert_array_equal, without_positions(larger.params), without_positions(loaded.params))
    same = loaded.at_resolution(Resolution(32))
    assert same.params is loaded.params and same.config == loaded.config
