"""Tests of the config keys that may change on resume."""

import copy

import pytest

from aimv2_jax.config.load import build_config, config_to_dict, flatten
from aimv2_jax.errors import UserError
from aimv2_jax.train.resume import COOLDOWN, MAY_CHANGE, check_resumable, check_trunk
from experiments import base


def _tree():
    tree = base.get_config().to_dict()
    tree["data"]["sources"] = {"photos": "/a/photos", "rest": "/a/rest"}
    tree["data"]["mixture"] = {"photos": {"alt": 1.0}, "rest": {"alt": 3.0}}
    tree["eval"]["sources"] = {"held_out": "/a/test"}
    return tree


def _saved():
    return config_to_dict(build_config(_tree()))


def _with(**changes):
    """The config with a.b set to value for `a__b=value`."""
    tree = _tree()
    for key, value in changes.items():
        *parents, leaf = key.split("__")
        node = tree
        for parent in parents:
            node = node[parent]
        node[leaf] = value
    return build_config(tree)


def test_config_when_nothing_changed_then_resumable():
    check_resumable(_saved(), _with())


@pytest.mark.parametrize(
    "changes",
    [
        {"train__steps": 7, "train__log_every": 1, "train__eval_every": 2, "train__save_every": 3, "train__keep": 9},
        {"train__keep_steps": (10, 20)},
        {"train__tensorboard": False, "train__wandb_project": "p", "train__compilation_cache": "/c"},
        {"train__microbatches": 4, "mesh__fsdp": 8, "mesh__data": 1},
        {"model__layers": "scan", "model__remat": "full"},
        {"data__workers": 0, "data__read_threads": 4, "data__prefetch": 5, "data__max_bad_fraction": 0.5},
        {"data__sources": {"photos": "gs://b/photos", "rest": "/b/rest"}, "tokenizer__path": "/b/t.model"},
        {"eval__sources": {}},
        {"eval__sources": {"held_out": "/b/test", "second": "/b/second"}, "eval__prefixes": (0.5,)},
        {"eval__caption_types": ("alt",), "eval__batch_size": 3, "eval__max_examples": 10},
    ],
)
def test_config_when_a_key_of_the_table_changed_then_resumable(changes):
    check_resumable(_saved(), _with(**changes))


@pytest.mark.parametrize(
    "changes, key, before, now",
    [
        ({"seed": 1}, "seed", "0", "1"),
        ({"optimizer__schedule_steps": 100_000}, "optimizer.schedule_steps", "1500000", "100000"),
        ({"optimizer__betas": (0.9, 0.99)}, "optimizer.betas", "0.95", "0.99"),
        ({"data__batch_size": 4096}, "data.batch_size", "8192", "4096"),
        ({"data__flip": 0.0}, "data.flip", "0.5", "0.0"),
        ({"data__mixture__rest": {"alt": 2.0}}, "data.mixture.rest.alt", "3.0", "2.0"),
        ({"data__mixture__rest": {"alt": 3.0, "synthetic": 1.0}}, "data.mixture.rest.synthetic", "absent", "1.0"),
        ({"optimizer__schedule": "half_cosine"}, "optimizer.schedule", "cosine", "half_cosine"),
        ({"train__cooldown_from": "t:20000"}, "train.cooldown_from", "None", "t:20000"),
        ({"loss__alpha": 0.5}, "loss.alpha", "0.4", "0.5"),
        ({"model__compute_dtype": "float32"}, "model.compute_dtype", "bfloat16", "float32"),
    ],
)
def test_config_when_another_key_changed_then_it_is_named_with_both_values(changes, key, before, now):
    with pytest.raises(UserError) as caught:
        check_resumable(_saved(), _with(**changes))
    message = str(caught.value)
    assert f"config {key} " in message and before in message and now in message and "--workdir" in message


def test_config_when_a_source_was_renamed_then_refused():
    changes = {
        "data__sources": {"photos": "/a/photos", "other": "/a/rest"},
        "data__mixture": {"photos": {"alt": 1.0}, "other": {"alt": 3.0}},
    }
    with pytest.raises(UserError, match=r"data\.mixture\.other\.alt|data\.sources\.(other|rest)"):
        check_resumable(_saved(), _with(**changes))


def test_config_when_a_source_went_from_the_saved_names_then_refused():
    saved = copy.deepcopy(_saved())
    saved["data"]["sources"]["third"] = "/a/third"
    with pytest.raises(UserError, match=r"data\.sources\.third"):
        check_resumable(saved, _with())


def test_config_when_the_model_changed_then_said_to_be_a_different_model():
    with pytest.raises(UserError, match=r"different model.*model\.encoder\.depth") as caught:
        check_resumable(_saved(), _with(model__encoder__depth=12))
    assert caught.value.value == "24 before, 12 now"


def test_table_when_compared_with_the_config_then_every_pattern_names_a_key():
    keys = flatten(_saved())
    for pattern, reason in MAY_CHANGE.items():
        assert reason
        assert any(key == pattern or key.startswith(pattern.removesuffix("*")) for key in keys), pattern


def test_trunk_when_only_its_cooldown_and_keys_of_the_table_differ_then_accepted():
    changes = {"optimizer__cooldown_share": 0.1, "optimizer__cooldown_lr": 0.0, "eval__sources": {}, "mesh__fsdp": 2}
    check_trunk(_saved(), _with(train__cooldown_from="t:20000", **changes))


def test_trunk_when_another_key_differs_then_it_is_named_with_both_values():
    with pytest.raises(UserError, match=r"t:20000 is a run with another data\.batch_size.*8192 there, 64 here"):
        check_trunk(_saved(), _with(train__cooldown_from="t:20000", data__batch_size=64))


def test_trunk_when_it_cools_down_itself_then_refused():
    saved = config_to_dict(_with(train__cooldown_from="t:20000"))
    with pytest.raises(UserError, match=r"cools down itself.*u:21000"):
        check_trunk(saved, _with(train__cooldown_from="u:21000"))


def test_cooldown_when_its_trunk_moved_then_resumable_and_not_at_another_step():
    saved = config_to_dict(_with(train__cooldown_from="here/t:20000"))
    check_resumable(saved, _with(train__cooldown_from="gs://there/t:20000"))
    with pytest.raises(UserError, match="here/t:20000 before, here/t:20001 now"):
        check_resumable(saved, _with(train__cooldown_from="here/t:20001"))


def test_cooldown_when_its_keys_are_compared_with_the_config_then_each_is_one_and_may_not_change():
    keys = flatten(_saved())
    assert all(key in keys and key not in MAY_CHANGE for key in COOLDOWN)
