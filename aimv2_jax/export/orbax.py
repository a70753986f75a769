"""Checkpoints of parameters alone: an encoder, or a whole model with its tokenizer, in the layout of a run's folder."""

from __future__ import annotations

from pathlib import Path

import jax
from flax import traverse_util

from aimv2_jax.eval.load import TOKENIZER, Choice, load
from aimv2_jax.export.weights import Weights
from aimv2_jax.train.checkpoint import Checkpointer, CheckpointReader, has_average


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
    tokenizer = loaded.tokenizer_file()
    meta = CheckpointReader(loaded.workdir).meta(loaded.step)
    eval_loss = None if has_average(meta) and weights == "raw" else meta["eval_loss"]  # That of the average.
    with Checkpointer(folder, keep=1) as checkpointer:
        checkpointer.save(loaded.step, {"params": loaded.params}, loaded.config, eval_loss)
    (folder / TOKENIZER).write_bytes(tokenizer)
