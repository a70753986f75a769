"""Metrics and figures of models without one of the losses, with full attention, or with another decoder."""

from __future__ import annotations

import dataclasses

import jax
import numpy as np
import pytest

from aimv2_jax.checkpoint.checkpointer import Checkpointer
from aimv2_jax.eval import visualize
from aimv2_jax.eval.heldout import held_out_metrics
from aimv2_jax.monitoring.metrics import MetricsWriter
from aimv2_jax.pretrained.model import load
from aimv2_jax.train.builder import build_setup
from tests.helpers.trained_run import random_state

KINDS = {
    "no text loss": ({"text": False}, {}, {"kind": "mlp"}),
    "no image loss": ({"image": False}, {"attention_mask": "full"}, {"token_keep_rate": 0.5}),
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
        checkpointer.save(3, random_state(build_setup(config, jax.devices()[:1])), config)
    with MetricsWriter(folder, tensorboard=False, wandb_project=None, config=config) as writer:
        for step in (1, 2, 3):
            writer.write(step, {"loss": 5.0 - step, "lr": 1e-3, "grad_norm": 1.0})
    return request.param, folder


def test_metrics_of_a_missing_loss_are_none(run):
    """The held-out metrics of a missing loss are None, and all others are finite."""
    kind, folder = run
    metrics = held_out_metrics(load(str(folder)))
    missing = {"no text loss": "loss_text", "no image loss": "loss_image"}.get(kind)
    for name, value in metrics.items():
        assert value is None if missing and name.startswith(missing) else np.isfinite(value), name


def test_figures_of_a_missing_loss_are_not_drawn(run, tmp_path):
    """`visualize` draws the curves, and the figures of the losses that the model has."""
    kind, folder = run
    assert visualize.main(["--checkpoint", str(folder), "--output", str(tmp_path), "--examples", "1"]) == 0
    missing = {"no text loss": "captions", "no image loss": "predictions"}.get(kind)
    names = {"predictions", "captions", "curves"} - {missing}
    assert {path.stem for path in tmp_path.iterdir()} == names
