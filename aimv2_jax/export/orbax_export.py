"""Parameter-only checkpoints of an encoder or a whole model with tokenizer, in the layout of a run's folder."""

from __future__ import annotations

from pathlib import Path

import jax
from flax import traverse_util

from aimv2_jax.checkpoint.checkpointer import Checkpointer, CheckpointReader, WeightChoice, params_tree
from aimv2_jax.pretrained.lazy_weights import LazyWeights
from aimv2_jax.pretrained.model import TOKENIZER, load


def write_encoder(folder: Path, weights: LazyWeights) -> None:
    """Writes an encoder's parameters, with the config of its run if known."""
    training = weights.training
    params = jax.device_put(traverse_util.unflatten_dict(weights.read(), sep="/"))
    with Checkpointer(folder, keep=1) as checkpointer:
        checkpointer.save(
            training.step if training else 0,
            {"params": params},
            training.config if training else None,
            extra={"vision": weights.spec.as_json()},
        )


def write_model(folder: Path, spec: str, weights: WeightChoice) -> None:
    """Writes all parameters, the config and the tokenizer of the model that `spec` names, for `load_model`."""
    loaded = load(spec, weights)
    tokenizer = loaded.tokenizer_file()
    meta = CheckpointReader(loaded.workdir).meta(loaded.step)
    eval_loss = meta["eval_loss"] if params_tree(meta, weights) == params_tree(meta) else None
    with Checkpointer(folder, keep=1) as checkpointer:
        checkpointer.save(loaded.step, {"params": loaded.params}, loaded.config, eval_loss)
    (folder / TOKENIZER).write_bytes(tokenizer)
