"""Metrics and figures of models without one of the losses, with full attention, or with another decoder."""

from __future__ import annotations

import dataclasses

import jax
import numpy as np
import pytest
from trained_run import drawn_state

from aimv2_jax.checkpoint.checkpointer import Checkpointer
from aimv2_jax.eval import visualize
from aimv2_jax.eval.heldout import held_out_metrics
from aimv2_jax.monitoring.metrics import MetricsWriter
from aimv2_jax.pretrained.model import load
from aimv2_jax.train.builder import build_setup

KINDS = {
    "patches alone": ({"text": False}, {}, {"kind": "mlp"}),
    "captions alone": ({"image": False}, {"attention_mask": "full"}, {"token_keep_rate": 0.5}),
    "separate decoders": ({}, {}, {"kind": "separate"}),
}


@pytest.fixture(scope="module", params=KINDS)
def run(request, config, tmp_path_factory):
    """An untrained model, saved as step 3 with a few lines of metrics."""
    loss, encoder, decoder = KINDS[request.param]
    parts = {"encoder": encoder, "decoder": decoder}
    changed = {name: dataclasses.replace(getattr(config.model, name), **values) for name, values in parts.items()}
    config = dataclasses.replace(
        config, model=dataclasses.replace(config.model, **changed), loss=dataclasses.replace(config.loss, **loss)
    )
    folder = tmp_path_factory.mktemp("kind")
    with Checkpointer(folder, keep=1) as checkpointer:
        checkpointer.save(3, drawn_state(build_setup(config, jax.devices()[:1])), config)
    with MetricsWriter(folder, tensorboard=False, wandb_project=None, config=config) as writer:
        for step in (1, 2, 3):
            writer.write(step, {"loss": 5.0 - step, "lr": 1e-3, "grad_norm": 1.0})
    return request.param, folder


def test_figures_when_a_loss_is_missing_then_null_and_the_others_finite(run):
    kind, folder = run
    figures = held_out_metrics(load(str(folder)))
    missing = {"patches alone": "loss_text", "captions alone": "loss_image"}.get(kind, "nothing")
    for name, value in figures.items():
        assert value is None if name.startswith(missing) else np.isfinite(value), name


def test_pictures_when_a_loss_is_missing_then_those_of_the_other_and_the_curves(run, tmp_path):
    kind, folder = run
    assert visualize.main(["--checkpoint", str(folder), "--output", str(tmp_path), "--examples", "1"]) == 0
    missing = {"patches alone": "captions", "captions alone": "predictions"}.get(kind)
    names = {"predictions", "captions", "curves"} - {missing}
    assert {path.stem for path in tmp_path.iterdir()} == names
