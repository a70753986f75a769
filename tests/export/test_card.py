"""The model card: what others may read of a run, and no markup from its names."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np

from aimv2_jax.config import load_config
from aimv2_jax.export.card import model_card
from aimv2_jax.export.vision import vision_of
from aimv2_jax.export.weights import Trained, Weights

QUICKSTART = Path(__file__).parents[2] / "experiments/quickstart.py"
HOSTILE = "a\n\n# Forged | ![x](http://evil) <img onerror=x> ```\n"


def make(config) -> Weights:
    """The weights of a run with `config`, of which the card reads no number."""
    vision = vision_of(config)
    trained = Trained(config=config, step=3, workdir="/nowhere", evaluated=False)
    return Weights("run", vision, vision.shapes(), lambda paths: dict.fromkeys(paths, np.zeros(1)), (), trained)


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
    shown = head.replace(r"\<", "").replace(r"\]", "")  # Escaped, these are letters.
    assert all(part not in shown for part in ("\n# Forged", "<img onerror", "](http://evil)"))
    assert head.count("```") == 2 and code.count("```") == 2  # Nothing leaves the block of the config.


def test_card_of_an_imported_model_shows_its_name_as_text():
    weights = dataclasses.replace(make(load_config(QUICKSTART)), source="m/x`<b>y", trained=None)
    assert r"Converted from x\`\<b\>y; how" in model_card(weights, "float32", 1)
