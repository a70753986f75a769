"""The model card: no private values of a run, and no markup from its names."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np

from aimv2_jax.config.load import load_config
from aimv2_jax.export.model_card import model_card
from aimv2_jax.pretrained.encoder_spec import encoder_spec_of
from aimv2_jax.pretrained.lazy_weights import LazyWeights, TrainingInfo

QUICKSTART = Path(__file__).parents[2] / "experiments/quickstart.py"
HOSTILE = "a\n\n# Forged | ![x](http://evil) <img onerror=x> ```\n"


def make(config) -> LazyWeights:
    """Weights of a run with `config`; the card does not read their values."""
    spec = encoder_spec_of(config)
    training = TrainingInfo(config=config, step=3, workdir="/nowhere", evaluated=False)
    return LazyWeights("run", spec, spec.shapes(), lambda paths: dict.fromkeys(paths, np.zeros(1)), (), training)


def card(config) -> str:
    return model_card(make(config), "float32", 1)


def test_card_leaves_out_folders_and_project_names():
    config = load_config(
        QUICKSTART,
        [
            ("data.sources.photo", "/home/me/secret"),
            ("tokenizer.path", "gs://my-bucket/t.model"),
            ("init.path", "gs://my-bucket/run"),
            ("train.wandb_project", "secret-project"),
            ("eval.sources.photo", "/home/me/secret"),
        ],
    )
    text = card(config)
    assert "secret" not in text and "my-bucket" not in text
    assert "data.image_size = " in text and "optimizer.peak_lr = " in text


def test_card_shows_names_as_text():
    config = load_config(QUICKSTART)
    mixture = {HOSTILE: dict(config.data.mixture["photo"])}
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, mixture=mixture))
    head, _, code = card(config).partition("## Config")
    markup = head.replace(r"\<", "").replace(r"\]", "")  # Escaped characters are not markup.
    assert all(part not in markup for part in ("\n# Forged", "<img onerror", "](http://evil)"))
    assert head.count("```") == 2 and code.count("```") == 2  # Nothing ends the config's code block early.


def test_card_of_an_imported_model_shows_its_name_as_text():
    weights = dataclasses.replace(make(load_config(QUICKSTART)), source="m/x`<b>y", training=None)
    assert r"Converted from x\`\<b\>y. Its" in model_card(weights, "float32", 1)
