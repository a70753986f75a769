"""Opens encoder weights from a run, an export, a Hugging Face folder or Apple's file."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import traverse_util

from aimv2_jax.checkpoint.checkpointer import CheckpointReader, WeightChoice, params_tree, parse_spec
from aimv2_jax.errors import UserError
from aimv2_jax.pretrained.encoder_spec import EncoderSpec, encoder_spec_from_json, encoder_spec_of
from aimv2_jax.pretrained.hf_import import is_foreign, read_weights
from aimv2_jax.pretrained.lazy_weights import LazyWeights, TrainingInfo
from aimv2_jax.pretrained.model import read_config
from aimv2_jax.train.task import run_key


def open_weights(spec: str | Path, heads: int | None = None, weights: WeightChoice = "average") -> LazyWeights:
    """Opens the encoder that `spec` names.

    Args:
      spec: a run or an export by `--format orbax`, as `WORKDIR` (its best step), `WORKDIR:STEP`, `WORKDIR:last`; a
        Hugging Face folder; a safetensors file in Hugging Face's or Apple's names.
      heads: attention heads of a safetensors file without a config, if they are not 128 wide.
      weights: "average": averaged parameters if the run kept them; "raw": those of the step.

    Raises:
      UserError: for any other path, or damaged files.
    """
    if is_foreign(spec):
        return read_weights(spec, heads)
    if heads is not None:
        raise UserError("heads are given for a run, whose config has them", heads, "Leave it out")
    workdir, step = parse_spec(spec)
    reader = CheckpointReader(workdir)
    meta = reader.meta(step)
    part = params_tree(meta, weights)
    encoder_spec, training = _encoder_spec(meta, workdir, step)
    if training is not None:
        training = dataclasses.replace(training, evaluated=part == params_tree(meta))

    def read(paths: Collection[str]) -> Mapping[str, np.ndarray]:
        sharding = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        leaves = {name: jax.ShapeDtypeStruct(shapes[name], np.float32, sharding=sharding) for name in paths}
        tree = reader.restore_part(step, {part: traverse_util.unflatten_dict(leaves, sep="/")})[part]
        return {name: np.asarray(leaf) for name, leaf in traverse_util.flatten_dict(tree, sep="/").items()}

    shapes = encoder_spec.shapes()
    return LazyWeights(f"{workdir}:{step}", encoder_spec, shapes, read, training=training)


def _encoder_spec(meta: Mapping[str, Any], workdir: str, step: int) -> tuple[EncoderSpec, TrainingInfo | None]:
    name = f"{workdir}:{step}"
    if meta["config"]:
        config = read_config(meta["config"], name)
        return encoder_spec_of(config), TrainingInfo(config, step, workdir)
    try:
        return encoder_spec_from_json(meta["extra"]["vision"]), None
    except (KeyError, TypeError) as error:
        raise UserError("the checkpoint has no encoder description", name, "Export it again") from error


def untrained(spec: EncoderSpec, seed: int) -> LazyWeights:
    """Newly initialised parameters of an encoder, as a baseline for trained ones."""
    tree = traverse_util.flatten_dict(spec.initial(run_key(seed)), sep="/")
    arrays = {name: np.asarray(leaf) for name, leaf in tree.items()}
    return LazyWeights(f"random:{seed}", spec, spec.shapes(), lambda paths: {name: arrays[name] for name in paths})
