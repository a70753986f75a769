import jax
import numpy as np
import pytest

from aimv2_jax.errors import UserError
from aimv2_jax.eval.load import load
from aimv2_jax.models.positions import resize_positions
from aimv2_jax.train.checkpoint import CheckpointReader


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
def test_load_when_there_is_no_such_checkpoint_then_user_error(workdir, spec):
    with pytest.raises(UserError, match="--checkpoint"):
        load(spec.format(workdir))


def test_load_when_the_saved_config_has_a_key_of_another_version_then_told_of_the_checkpoint(workdir, monkeypatch):
    meta = CheckpointReader(workdir).meta(20)
    monkeypatch.setattr(CheckpointReader, "meta", lambda *_: {**meta, "config": {**meta["config"], "new": 1}})
    with pytest.raises(UserError, match=r"checkpoint .*:20 is not one of this aimv2_jax.*'new'"):
        load(str(workdir))


def test_load_when_the_saved_config_is_of_a_version_with_fewer_keys_then_the_others_are_as_it_behaved(
    workdir, monkeypatch
):
    plain = CheckpointReader.meta
    config = dict(CheckpointReader(workdir).meta(20)["config"])
    del config["guard"]
    config["watch"] = {"data_s": 7}
    monkeypatch.setattr(CheckpointReader, "meta", lambda self, step: plain(self, step) | {"config": config})
    read = load(str(workdir)).config
    assert (read.guard.max_nonfinite, read.guard.spike) == (1, "off")
    assert (read.watch.data_s, read.watch.save_s, read.watch.stop_s) == (7, 0, 0)


def test_model_when_seen_at_another_resolution_then_its_positions_are_resized_and_nothing_else(workdir):
    loaded = load(str(workdir))
    larger = loaded.seen_at("48")
    assert (larger.config.grid, larger.task.model.encoder.num_patches) == ((6, 6), 36)
    expected = resize_positions(loaded.params["encoder"]["position"], (4, 4), (6, 6))
    np.testing.assert_array_equal(larger.params["encoder"]["position"], expected)
    rest = lambda params: {**params, "encoder": {**params["encoder"], "position": None}}  # noqa: E731
    jax.tree.map(np.testing.assert_array_equal, rest(larger.params), rest(loaded.params))
    same = loaded.seen_at("32")
    assert same.params is loaded.params and same.config == loaded.config
