"""The baselines and ablations: the keys that each changes, that each builds, and that tiny versions train."""

from __future__ import annotations

import dataclasses
import math
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from aimv2_jax.config.load import config_to_dict, flatten, load_config
from aimv2_jax.config.schema import Config
from aimv2_jax.data import pipeline
from aimv2_jax.data.tokenizer import Tokenizer
from aimv2_jax.models.aimv2 import count_parameters
from aimv2_jax.parallel import rules
from aimv2_jax.train.builder import build_setup
from aimv2_jax.train.optimizer import learning_rate
from experiments.ablations import RUNS
from tests.helpers.golden_names import paths
from tests.helpers.tiny import QUICKSTART, ROOT, overrides
from tests.helpers.trained_run import random_state

FILE = ROOT / "experiments/ablations.py"
GOLDEN = Path(__file__).parents[1] / "golden_configs/ablations.txt"
NAMES = sorted(RUNS)
MESH = [("mesh.data", "2"), ("mesh.fsdp", "2"), ("mesh.tensor", "2"), ("model.layers", "scan")]


def changes(name: str) -> dict[str, object]:
    """Returns the keys in which an ablation differs from AIMv2's run of the same length, and that from pre-training."""
    of = "pretrain.py:large" if name == "aimv2" else "ablations.py:aimv2"
    runs = (of, f"ablations.py:{name}")
    reference, ablation = (flatten(config_to_dict(load_config(ROOT / "experiments" / run))) for run in runs)
    assert reference.keys() == ablation.keys()
    return {key: ablation[key] for key in reference if reference[key] != ablation[key]}


def summary() -> str:
    """Returns a paragraph of changed keys for each ablation."""
    text = ""
    for name in NAMES:
        text += f"{name}\n" + "".join(f"    {key} = {value!r}\n" for key, value in changes(name).items())
    return text


def test_ablations_when_compared_with_aimv2_then_each_changes_what_was_reviewed():
    assert GOLDEN.read_text() == summary(), "if the change is intended, run python -m tests.write_golden_configs"


def test_ablation_when_started_in_another_folder_then_what_it_builds_on_is_found(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [path for path in sys.path if Path(path).resolve() not in (ROOT, tmp_path)])
    for name in [name for name in sys.modules if name.partition(".")[0] == "experiments"]:
        monkeypatch.delitem(sys.modules, name)
    assert load_config(f"{FILE}:ema").optimizer.ema_decay == 0.9999


def block(width: int, hidden: int) -> int:
    """Counts the parameters of a block: two gains, q, k, v and out, gate, up and down."""
    return 2 * width + 4 * width**2 + 3 * width * hidden


def decoder(width: int, depth: int, hidden: int, image: bool = True, text: bool = True) -> int:
    trunk = depth * block(width, hidden) + width
    projection = 1024 * width + width
    words = 32_000 * width + 78 * width + width + width * 32_000
    return trunk + projection + image * width * 588 + text * words


# Blocks of AIMv1's head have no attention; its two linear layers have biases.
AIMV1_HEAD = (1024 * 2048 + 2048) + 12 * (2 * 2048 + 3 * 2048 * 5632) + 2048 + (2048 * 588 + 588)
DECODERS = {
    "aimv1": AIMV1_HEAD,
    "separate_decoders": decoder(1024, 12, 2816, text=False) + decoder(1024, 12, 2816, image=False),
    "decoder_width_512": decoder(512, 12, 1536),
    "decoder_width_1536": decoder(1536, 12, 4096),
    "decoder_depth_8": decoder(1024, 8, 2816),
    "decoder_depth_16": decoder(1024, 16, 2816),
}


def test_counts_when_done_by_hand_then_those_that_the_recipe_gives():
    assert decoder(1024, 12, 2816) == 221_434_880
    assert AIMV1_HEAD == 418_591_308
    assert DECODERS["separate_decoders"] == 155_817_984 + 220_832_768


@pytest.mark.parametrize("name", [name for name in NAMES if not name.startswith("alpha")])
def test_ablation_when_built_at_its_size_then_counted_by_hand_and_laid_out_by_the_rules(name):
    program = build_setup(load_config(f"{FILE}:{name}", MESH))
    state = program.abstract_state
    assert count_parameters(state.params["decoder"]) == DECODERS.get(name, 221_434_880)
    assert count_parameters(state.params["encoder"]) == (309_001_216 if name == "curriculum_1_112" else 309_197_824)
    axes, lookup = paths(program.task.logical_axes()), dict(rules.RULES)
    parameters = [state.params] + ([state.ema_params] if name == "ema" else [])
    for tree in parameters:
        for path, leaf in paths(tree).items():
            assert tuple(leaf.sharding.spec) == tuple(lookup[axis] for axis in axes[path]), path
    assert (state.ema_params is not None) == (name == "ema")


def test_curriculum_when_its_runs_are_put_together_then_the_samples_and_the_schedule_of_one():
    whole, small, large = (load_config(f"{FILE}:{name}") for name in ("aimv2", "curriculum_1_112", "curriculum_2_224"))
    assert small.train.steps + large.train.steps == whole.train.steps == math.ceil(2e9 / 8192)
    assert small.optimizer == whole.optimizer and large.train.steps == large.optimizer.schedule_steps
    names = ("start_lr", "peak_lr", "end_lr", "warmup_steps", "schedule_steps")
    rate = learning_rate(**{name: getattr(whole.optimizer, name) for name in names})
    assert large.optimizer.peak_lr == pytest.approx(float(rate(jnp.int32(small.train.steps))), rel=1e-4)
    decay = large.optimizer.weight_decay / large.optimizer.peak_lr
    assert decay == pytest.approx(whole.optimizer.weight_decay / whole.optimizer.peak_lr)


def tiny_version(name: str) -> Config:
    """Returns an ablation 64 times narrower and four times shallower, on the quickstart's images."""
    config = load_config(f"{FILE}:{name}")
    encoder, head = config.model.encoder, config.model.decoder
    quickstart = load_config(QUICKSTART, overrides())
    sizes = {"model.encoder.depth": 2, "model.encoder.heads": 2, "model.decoder.heads": 2}
    sizes |= {"model.encoder.width": encoder.width // 64, "model.decoder.width": head.width // 64}
    sizes |= {"model.decoder.depth": head.depth // 4, "model.encoder.hidden": 32, "model.decoder.hidden": 32}
    sizes |= {"model.decoder.vocab_size": 1024, "model.decoder.text_length": 12, "model.compute_dtype": "float32"}
    sizes |= {"model.layers": "scan", "mesh.fsdp": 1, "data.batch_size": 8, "data.workers": 0}
    sizes |= {"data.image_size": config.data.image_size // 4}
    sizes |= {"optimizer.peak_lr": 1e-2, "optimizer.warmup_steps": 1, "optimizer.schedule_steps": 100}
    tiny = load_config(f"{FILE}:{name}", [(key, str(value)) for key, value in sizes.items()])
    data = dataclasses.replace(tiny.data, sources=quickstart.data.sources, mixture=quickstart.data.mixture)
    return dataclasses.replace(tiny, data=data, tokenizer=quickstart.tokenizer)


METRICS = {"lr", "grad_norm", "param_norm", "patch_utilisation"}
METRICS |= {"loss_zscore", "grad_norm_zscore", "skipped", "nonfinite_steps"}
LOSSES = {"aimv1": {"image"}, **{name: {"text"} for name in NAMES if name.startswith("captioning")}}
ALL = {"image", "text"}
# The other ablations differ from AIMv2 only in numbers; these represent them.
TRAINED = [*LOSSES, "separate_decoders", "ema", "curriculum_1_112"]
# Other programs in this test contain the changes of these; tests/end_to_end/test_average.py trains with an average.
SLOW = {"captioning_full", "captioning_prefix", "curriculum_1_112", "ema"}


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer(load_config(QUICKSTART).tokenizer.path, 12, 1024)


@pytest.mark.parametrize("name", [pytest.param(name, marks=[pytest.mark.slow] * (name in SLOW)) for name in TRAINED])
def test_ablation_when_tiny_and_trained_on_one_batch_then_its_losses_fall(name, tokenizer):
    config = tiny_version(name)
    program = build_setup(config, jax.devices()[:1])
    rows = np.arange(8)
    with pipeline.training_batches(config, lambda _: rows, 0, tokenizer) as batches:
        arrays = pipeline.to_devices(next(batches).arrays, program.batch_sharding, rows, 8)
    batch = {key: arrays[key] for key in program.abstract_batch(program.config.batch_shapes[0])}
    step = program.lower_step(config.batch_shapes[0]).compile(compiler_options={"xla_backend_optimization_level": 0})
    state, lines = random_state(program), []
    for _ in range(4):
        state, metrics = step(state, batch, program.rng)
        lines.append(jax.device_get(metrics))
    losses = {f"loss_{loss}": config.loss.alpha if loss == "image" else 1 for loss in LOSSES.get(name, ALL)}
    counts = {loss.replace("loss", "count") for loss in losses}
    assert set(lines[0]) == {"loss", *losses, *counts, *METRICS}
    assert all(np.isfinite(value) for line in lines for value in line.values())
    assert all(lines[-1][loss] < lines[0][loss] for loss in losses)
    assert lines[0]["loss"] == pytest.approx(sum(weight * lines[0][loss] for loss, weight in losses.items()), rel=1e-6)
