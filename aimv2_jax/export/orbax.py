"""Checkpoints of parameters alone: an encoder, or a whole model with its tokenizer, in the layout of a run's folder."""

from __future__ import annotations

import shutil
from pathlib import Path

import jax
from flax import traverse_util

from aimv2_jax.data.locations import locate
from aimv2_jax.eval.load import TOKENIZER, Choice, load
from aimv2_jax.export.weights import Weights
from aimv2_jax.train.checkpoint import Checkpointer, CheckpointReader


def write_encoder(folder: Path, weights: Weights) -> None:
    """The parameters of an encoder, with its run's config where there was one."""
    trained = weights.trained
    params = jax.device_put(traverse_util.unflatten_dict(weights.read(), sep="/"))
    with Checkpointer(folder, keep=1) as checkpointer:
        checkpointer.save(
            trained.step if trained else 0,
            {"params": params},
            trained.config if trained else None,
            extra={"vision": weights.vision.as_json()},
        )


def write_model(folder: Path, spec: str, weights: Choice) -> None:
    """All parameters of the model that `spec` names, its config and its tokenizer: what `load_model` reads."""
    loaded = load(spec, weights)
    eval_loss = CheckpointReader(loaded.workdir).meta(loaded.step)["eval_loss"]
    with Checkpointer(folder, keep=1) as checkpointer:
        checkpointer.save(loaded.step, {"params": loaded.params}, loaded.config, eval_loss)
    if loaded.config.tokenizer.path:
        shutil.copyfile(locate(loaded.config.tokenizer.path), folder / TOKENIZER)
