"""Parameter-only checkpoints of an encoder or a whole model with tokenizer, in the layout of a run's folder."""

from __future__ import annotations

from pathlib import Path

import jax
from flax import traverse_util

from aimv2_jax.checkpoint.checkpointer import Checkpointer, CheckpointReader, WeightChoice, params_tree
from aimv2_jax.pretrained.dual_encoder_spec import DualEncoderSpec
from aimv2_jax.pretrained.lazy_weights import LazyWeights
from aimv2_jax.pretrained.model import load
from aimv2_jax.pretrained.source import DUAL_ENCODER
from aimv2_jax.pretrained.tokenizer_file import copy_tokenizer


def write_weights(folder: Path, weights: LazyWeights) -> None:
    """Writes the parameters of an encoder or of both towers, with the config of its run if known."""
    training = weights.training
    params = jax.device_put(traverse_util.unflatten_dict(weights.read(), sep="/"))
    extra = {"vision": weights.image.as_json()}
    if isinstance(weights.spec, DualEncoderSpec):
        extra[DUAL_ENCODER] = weights.spec.as_json()
    with Checkpointer(folder, keep=1) as checkpointer:
        checkpointer.save(
            training.step if training else 0,
            {"params": params},
            training.config if training else None,
            extra=extra,
        )
    if weights.tokenizer is not None:
        copy_tokenizer(weights.tokenizer, folder)


def write_model(folder: Path, spec: str, weights: WeightChoice) -> None:
    """Writes all parameters, the config and the tokenizer of the model that `spec` names, for `load_model`."""
    loaded = load(spec, weights)
    file_name, tokenizer = loaded.tokenizer_file()
    meta = CheckpointReader(loaded.workdir).meta(loaded.step)
    eval_loss = meta["eval_loss"] if params_tree(meta, weights) == params_tree(meta) else None
    with Checkpointer(folder, keep=1) as checkpointer:
        extra = {"data": meta["extra"].get("data")}  # Identifies the tokenizer for runs that start from the export.
        checkpointer.save(loaded.step, {"params": loaded.params}, loaded.config, eval_loss, extra)
    (folder / file_name).write_bytes(tokenizer)
