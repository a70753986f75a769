"""Config: parsing, rejected values with their messages, and the resolved experiments."""

from __future__ import annotations

import importlib
import re
from pathlib import Path

import jax
import pytest
from hypothesis import given
from hypothesis import strategies as st

from aimv2_jax.config.load import build_config, config_text, config_to_dict, load_config
from aimv2_jax.config.schema import Cooldown, mixture_counts
from aimv2_jax.errors import UserError
from aimv2_jax.models.aimv2 import count_parameters
from aimv2_jax.models.sizes import swiglu_hidden
from aimv2_jax.parallel.hardware import CHIPS
from aimv2_jax.train.optimizer import decay_report
from aimv2_jax.train.task import run_key
from aimv2_jax.train.tasks import build_task
from tests.helpers.golden_names import paths

ROOT = Path(__file__).parents[2]
GOLDEN = Path(__file__).parents[1] / "golden_configs"
QUICKSTART = ROOT / "experiments/quickstart.py"

# RECIPE.md §1: parameters of the encoder at 224 / 336 / 448 px, and of the whole model at 224 px.
COUNTS = {
    "base": ((85_603_584, 85_849_344, 86_193_408), 306_776_320),
    "large": ((309_197_824, 309_525_504, 309_984_256), 530_632_704),
    "huge": ((680_851_968, 681_343_488, 682_031_616), 902_811_136),
    "1b": ((1_234_958_336, 1_235_613_696, 1_236_531_200), 1_457_441_792),
    "3b": ((2_720_658_432, 2_721_641_472, 2_723_017_728), 2_944_190_464),
}


def experiments() -> list[str]:
    """Returns all runs as `--config` names them.

    Left out are base (without data), the ablations (test_ablations.py) and the runs on a named chip (test_tpu.py).
    """
    files = [path for path in sorted((ROOT / "experiments").glob("*.py")) if "def get_config" in path.read_text()]
    modules = {path: importlib.import_module(f"experiments.{path.stem}") for path in files}
    return [
        f"{path}:{run}" if run else str(path)
        for path, module in modules.items()
        for run in getattr(module, "RUNS", ("",))
        if path.stem not in ("base", "ablations") and run.rpartition(",")[2] not in CHIPS
    ]


def golden_file(experiment: str) -> Path:
    """Returns the file of the resolved text: pretrain_large.txt for experiments/pretrain.py:large."""
    return GOLDEN / f"{re.sub('[:,]', '_', Path(experiment).name.replace('.py', ''))}.txt"


def abstract_params(config):
    return jax.eval_shape(build_task(config).init, run_key(0))


@pytest.mark.parametrize("experiment", experiments(), ids=lambda experiment: golden_file(experiment).stem)
def test_experiment_when_resolved_then_equals_its_golden_text(experiment):
    golden = golden_file(experiment)
    text = config_text(load_config(experiment))
    assert golden.is_file() and golden.read_text() == text, (
        f"{experiment} resolves differently than reviewed. If this is intended, write the new text:\n"
        f"python -m tests.write_golden_configs"
    )


@pytest.mark.parametrize("experiment", experiments(), ids=lambda experiment: golden_file(experiment).stem)
def test_experiment_when_built_by_shape_then_has_parameters(experiment):
    assert count_parameters(abstract_params(load_config(experiment))) > 10**6


@pytest.mark.parametrize("size", COUNTS)
def test_parameter_counts_when_any_size_and_resolution_then_equal_the_recipe(size):
    encoders, whole = COUNTS[size]
    path = ROOT / f"experiments/pretrain.py:{size}"
    for pixels, encoder in zip((224, 336, 448), encoders):
        params = abstract_params(load_config(path, [("data.image_size", str(pixels))]))
        assert count_parameters(params["encoder"]) == encoder
        if pixels == 224:
            assert count_parameters(params) == whole


def test_parameter_counts_when_large_then_every_part_equals_the_recipe():
    path = ROOT / "experiments/pretrain.py:large"
    native = abstract_params(load_config(path, [("model.encoder.position", "sincos")]))
    assert count_parameters(native["encoder"]) == 308_935_680
    decoder = abstract_params(load_config(path))["decoder"]
    parts = {name: count_parameters(leaves) for name, leaves in decoder.items()}
    assert parts == {
        "trunk": 154_166_272,
        "image_embed": 1_049_600,
        "token_table": 32_768_000,
        "position": 79_872,
        "begin": 1_024,
        "token_head": 32_768_000,
        "pixel_head": 602_112,
    }


def test_swiglu_hidden_when_any_width_then_equals_the_reference():
    widths = {1024: 2816, 1536: 4096, 2048: 5632, 3072: 8192, 768: 2048, 384: 1024, 256: 768}
    assert {width: swiglu_hidden(width) for width in widths} == widths


def test_swiglu_hidden_when_set_in_the_config_then_the_rule_gives_way():
    config = load_config(QUICKSTART, [("model.encoder.hidden", "80")])
    leaf = paths(abstract_params(config))["encoder/trunk/blocks/mlp/gate/kernel"]
    assert leaf.shape == (config.model.encoder.depth, config.model.encoder.width, 80)


def test_decayed_tensors_when_listed_then_equal_the_golden_list():
    report = decay_report(abstract_params(load_config(QUICKSTART)))
    assert report == (GOLDEN / "decay.txt").read_text(), "the set of decayed tensors has changed: is this intended?"


def test_config_when_turned_to_plain_values_and_back_then_equal():
    config = load_config(QUICKSTART)
    assert build_config(config_to_dict(config)) == config


def test_cooldown_when_a_step_is_named_then_its_length_and_the_end_of_the_run_follow():
    config = load_config(QUICKSTART, [("train.cooldown_from", "gs://b/trunk:213"), ("train.steps", "9")])
    assert config.cooldown == Cooldown("gs://b/trunk", 213, 53)
    assert config.train.steps == 213 + 53
    assert build_config(config_to_dict(config)) == config
    assert load_config(QUICKSTART).cooldown is None


def test_override_when_each_type_is_typed_then_read_by_its_key():
    config = load_config(
        QUICKSTART,
        [
            ("train.steps", "7"),
            ("optimizer.peak_lr", "3e-4"),
            ("optimizer.betas", "(0.8, 0.9)"),
            ("loss.image", "false"),
            ("model.layers", "loop"),
            ("eval.max_examples", "none"),
            ("tokenizer.path", "5"),
            ("data.mixture.photo.alt", "0"),
        ],
    )
    assert (config.train.steps, config.optimizer.peak_lr, config.optimizer.betas) == (7, 3e-4, (0.8, 0.9))
    assert (config.loss.image, config.model.layers, config.eval.max_examples) == (False, "loop", None)
    assert config.tokenizer.path == "5" and config.data.mixture["photo"]["alt"] == 0


REFUSED = {
    "unknown key": (("train.stepz", "3"), ["train.stepz", "train.steps"]),
    "renamed key": (("eval.kinds", "('alt',)"), ["eval.kinds", "called eval.caption_types now"]),
    "unknown section": (("trian.steps", "3"), ["trian", "train"]),
    "key below a value": (("seed.x", "3"), ["seed.x"]),
    "text for a number": (("train.steps", "many"), ["train.steps", "many", "whole number"]),
    "fraction for a whole number": (("data.batch_size", "1.5"), ["data.batch_size", "1.5"]),
    "truth for a number": (("train.steps", "True"), ["train.steps"]),
    "number for truth": (("loss.image", "1"), ["loss.image", "true or false"]),
    "unknown choice": (("model.remat", "some"), ["model.remat", "some", "none, matmuls, gate, attention, full"]),
    "wrong length": (("optimizer.betas", "(0.9,)"), ["optimizer.betas", "2 values"]),
    "not finite": (("optimizer.peak_lr", "1e999"), ["optimizer.peak_lr", "inf"]),
    "too large for float32": (("loss.alpha", "1e39"), ["loss.alpha", "float32"]),
    "zero in float32": (("model.norm_eps", "1e-46"), ["model.norm_eps", "float32"]),
    "a fraction of thousands of digits": (("data.flip", "1" * 4000), ["data.flip", "111 ... 111"]),
    "too large for int32": (("train.steps", "99999999999"), ["train.steps", "99999999999", "below 2147483648"]),
    "more workers than a machine bears": (("data.workers", "100000"), ["data.workers", "100000"]),
    "too deep to be read": (("train.steps", "-" * 3000 + "1"), ["train.steps", "whole number"]),
    "a key that cannot be one": (("eval.prefixes", "{[]: 1}"), ["eval.prefixes", "{[]: 1}"]),
    "a line break in a key": (("data.sources.a\nb", "x"), ["data.sources"]),
    "heads": (("model.encoder.heads", "7"), ["model.encoder.heads", "7 heads, width 192"]),
    "decoder heads": (("model.decoder.heads", "5"), ["model.decoder.heads"]),
    "zero steps": (("train.steps", "0"), ["train.steps", "at least 1"]),
    "negative workers": (("data.workers", "-1"), ["data.workers"]),
    "negative seed": (("seed", "-1"), ["seed", "-1"]),
    "image size": (("data.image_size", "113"), ["113 px", "112"]),
    "one patch": (("data.image_size", "14"), ["data.image_size", "two"]),
    "beta": (("optimizer.betas", "(0.9, 1.0)"), ["betas[1]", "1.0"]),
    "decay": (("optimizer.weight_decay", "1.5"), ["optimizer.weight_decay", "1.5"]),
    "warm-up beyond the schedule": (("optimizer.warmup_steps", "100000"), ["schedule_steps", "100000"]),
    "unknown schedule": (("optimizer.schedule", "linear"), ["optimizer.schedule", "cosine, half_cosine"]),
    "a cooldown of no run": (("train.cooldown_from", "runs/trunk"), ["train.cooldown_from", "WORKDIR:STEP"]),
    "a cooldown in the warm-up": (("train.cooldown_from", "t:39"), ["cooldown_from", "step 39 of 40"]),
    "a cooldown beyond int32": (("train.cooldown_from", "t:2000000000"), ["cooldown_from", "below 2147483648"]),
    "a cooldown of no length": (("optimizer.cooldown_share", "0"), ["optimizer.cooldown_share", "between 0 and 1"]),
    "a cooldown of all steps": (("optimizer.cooldown_share", "1"), ["optimizer.cooldown_share", "between 0 and 1"]),
    "step 0 kept": (("train.keep_steps", "(0, 5)"), ["train.keep_steps[0]", "at least 1"]),
    "both losses off": (("loss", {"image": False, "text": False}), ["loss.image and loss.text"]),
    "unknown source": (("data.mixture.paintings.alt", "1"), ["paintings", "data.sources.paintings"]),
    "source without weight": (("data.sources.paintings", "x"), ["paintings", "data.mixture.paintings"]),
    "negative weight": (("data.mixture.photo.alt", "-1"), ["data.mixture.photo.alt"]),
    "endless cycle": (("data.mixture.photo.alt", "0.123456789"), ["data.mixture", "fewer digits"]),
    "microbatches": (("train.microbatches", "5"), ["train.microbatches", "5 microbatches, batch 32"]),
    "mesh": (("mesh.fsdp", "0"), ["mesh.fsdp"]),
    "prefix": (("eval.prefixes", "(1.5,)"), ["eval.prefixes[0]", "1.5"]),
    "a kind twice": (("eval.caption_types", "('alt', 'alt')"), ["eval.caption_types", "twice"]),
    "crop": (("data.crop_area", "(0.9, 0.4)"), ["data.crop_area"]),
    "flip": (("data.flip", "2"), ["data.flip"]),
    "next patches in sight": (("model.encoder.attention_mask", "full"), ["attention_mask", "Set loss.image=False"]),
    "text of a head for patches": (
        ("model.decoder.kind", "mlp"),
        ["model.decoder.kind", "'mlp'", "Set loss.text=False"],
    ),
    "positions of that head": (("model.decoder", {"kind": "mlp", "width": 30}), ["model.decoder.width", "30", "of 4"]),
    "dropped rows and patches": (
        ("model.decoder.token_keep_rate", "0.5"),
        ["token_keep_rate", "0.5", "Set loss.image=False"],
    ),
    "no rows": (("model.decoder.token_keep_rate", "0"), ["model.decoder.token_keep_rate", "above 0"]),
    "average for ever": (("optimizer.ema_decay", "1.0"), ["optimizer.ema_decay", "1.0", "[0, 1)"]),
}


# Changes of a LiT run, and words of the refusal.
LIT_REFUSED = {
    "a frozen tower": ({"lit.trainable": "('encoder',)"}, ["lit.trainable", "encoder", "frozen", "task=pretrain"]),
    "an unknown part": ({"lit.trainable": "('tower',)"}, ["lit.trainable", "'tower'", "text_projection"]),
    "nothing to train": ({"lit.trainable": "()"}, ["lit.trainable is empty"]),
    "no encoder": ({"init.reinit": "()"}, ["init.path", "random weights", "init.reinit=('encoder',)"]),
    "one pair": ({"data.batch_size": "1"}, ["data.batch_size", "1", "negatives"]),
    "one held-out pair": ({"eval.batch_size": "1"}, ["eval.batch_size", "negatives"]),
    "microbatches": ({"train.microbatches": "2"}, ["train.microbatches", "2", "lit.chunks"]),
    "no chunks": ({"lit.chunks": "0"}, ["lit.chunks", "at least 1"]),
    "a bias that softmax lacks": ({"lit.trainable": "('logit_bias',)"}, ["lit.trainable", "softmax"]),
    "areas": ({"data.areas": "(8, 16)", "model.encoder.position": "sincos"}, ["data.areas", "(8, 16)"]),
    "heads": ({"lit.text.heads": "5"}, ["lit.text.heads", "5 heads"]),
    "no room for the end": ({"lit.text.text_length": "1"}, ["lit.text.text_length", "at least 2"]),
    "an unknown loss": ({"lit.loss": "triplet"}, ["lit.loss", "softmax, sigmoid"]),
}


@pytest.mark.parametrize("case", LIT_REFUSED)
def test_lit_when_a_value_cannot_work_then_refused(case):
    """A LiT config that cannot work is refused in one line that names the key and the remedy."""
    changes, words = LIT_REFUSED[case]
    with pytest.raises(UserError) as error:
        load_config(QUICKSTART, [("task", "lit"), ("init.reinit", "('encoder',)"), *changes.items()])
    message = str(error.value)
    assert all(word in message for word in words), message
    assert message.count("\n") == 0


@pytest.mark.parametrize("case", REFUSED)
def test_config_when_a_value_cannot_work_then_refused_naming_it(case):
    (key, value), words = REFUSED[case]
    overrides = (
        [(f"{key}.{name}", str(item)) for name, item in value.items()] if isinstance(value, dict) else [(key, value)]
    )
    with pytest.raises(UserError) as error:
        load_config(QUICKSTART, overrides)
    message = str(error.value)
    assert all(word in message for word in words), message
    assert message.count("\n") == 0


def test_config_when_a_key_is_missing_then_refused_naming_it():
    tree = config_to_dict(load_config(QUICKSTART))
    del tree["train"]["keep"]
    with pytest.raises(UserError, match=r"train\.keep"):
        build_config(tree)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (None, "no such file"),
        ("x = 1", "get_config"),
        ("def get_config(:", "not valid Python"),
        ("def get_config(): return {}", "ConfigDict"),
        ("\nimport nosuchmodule", r"experiment\.py:2.*nosuchmodule"),
        ("def get_config():\n    raise ValueError('one\\ntwo')", r"experiment\.py:2.*ValueError: one\."),
        ("raise SystemExit(0)", r"experiment\.py:1.*SystemExit"),
        ("def get_config(x): pass", "get_config.*'x'"),
    ],
)
def test_config_when_the_file_is_no_experiment_then_refused(tmp_path, text, words):
    path = tmp_path / "experiment.py"
    if text is not None:
        path.write_text(text)
    with pytest.raises(UserError, match=words):
        load_config(path)


@pytest.mark.parametrize(
    ("run", "first"),
    [
        ("", "base large huge 1b 3b"),
        (":", "base large huge 1b 3b"),
        (":lrge", "large"),
        (":large,v6", "large,v6e large,v"),
    ],
)
def test_experiment_unknown_run_is_refused(run, first):
    """A file of several runs lists them when none of them is named, those with a like name first."""
    with pytest.raises(UserError, match=rf"no such run.*pretrain\.py:RUN, where RUN is one of {first}.* \(of 30\)\."):
        load_config(f"{ROOT}/experiments/pretrain.py{run}")


def test_experiment_without_runs_takes_no_argument():
    """A run that is given to a file of one experiment is refused."""
    with pytest.raises(UserError, match=r"quickstart\.py.*takes 0 positional arguments"):
        load_config(f"{QUICKSTART}:large")


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("pretrain_large_224.py", "pretrain.py:large"),
        ("pretrain_1b_224.py", "pretrain.py:1b"),
        ("highres_448_3b.py", "highres.py:3b,448"),
        ("native_large.py", "native.py:large"),
        ("ablations/alpha_0_2.py", "ablations.py:alpha_0_2"),
        ("stages/small.py", "stages.py:small"),
    ],
)
def test_experiment_old_path_names_the_new_one(old, new):
    """An experiment that had its own file is refused with its present name."""
    with pytest.raises(UserError, match=rf"no such file.*It is {re.escape(f'{ROOT}/experiments/{new}')} now\."):
        load_config(f"{ROOT}/experiments/{old}")


def test_mixture_counts_when_written_as_decimals_then_exact_integers():
    paper = {"dfn": {"alt": 0.30, "synthetic": 0.30}, "coyo": {"alt": 0.09}, "hqitp": {"alt": 0.28, "synthetic": 0.03}}
    assert mixture_counts(paper) == {
        "dfn": {"alt": 30, "synthetic": 30},
        "coyo": {"alt": 9},
        "hqitp": {"alt": 28, "synthetic": 3},
    }


@given(st.lists(st.integers(0, 1000), min_size=1, max_size=6).filter(any))
def test_mixture_counts_when_any_thousandths_then_in_proportion_and_smallest(thousandths):
    mixture = {f"s{i}": {"alt": n / 1000} for i, n in enumerate(thousandths)}
    counts = mixture_counts(mixture)
    total, whole = sum(c["alt"] for c in counts.values()), sum(thousandths)
    for i, n in enumerate(thousandths):
        assert counts.get(f"s{i}", {"alt": 0})["alt"] * whole == n * total
    assert total <= whole
