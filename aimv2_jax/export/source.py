"""Where an encoder may come from, and one way to open it: a run, an export of ours, Hugging Face's, Apple's."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import traverse_util

from aimv2_jax.errors import UserError
from aimv2_jax.eval.load import Choice, read_config
from aimv2_jax.export.reading import is_foreign, read_weights
from aimv2_jax.export.vision import Vision, vision_from_json, vision_of
from aimv2_jax.export.weights import Trained, Weights
from aimv2_jax.train.checkpoint import CheckpointReader, has_average, parse_spec
from aimv2_jax.train.task import run_key


def open_weights(spec: str | Path, heads: int | None = None, weights: Choice = "average") -> Weights:
    """The encoder that `spec` names.

    Args:
      spec: a run or an export by `--format orbax`, as `WORKDIR` (its best step), `WORKDIR:STEP`, `WORKDIR:last`; a
        folder of Hugging Face's; a safetensors file in Hugging Face's or Apple's names.
      heads: of a safetensors file by itself, where its width is not 128 a head.
      weights: of a run that kept an average of its parameters, that ("average") or the step's own ("raw").

    Raises:
      UserError: for what is none of these, or is damaged.
    """
    if is_foreign(spec):
        return read_weights(spec, heads)
    if heads is not None:
        raise UserError("heads are asked of a run, which knows its own", heads, "Leave it out")
    workdir, step = parse_spec(spec)
    reader = CheckpointReader(workdir)
    meta = reader.meta(step)
    averaged = has_average(meta)
    part = "average" if weights == "average" and averaged else "params"
    vision, trained = _vision(meta, workdir, step)
    if trained is not None and averaged and part == "params":
        trained = dataclasses.replace(trained, evaluated=False)

    def read(paths: Collection[str]) -> Mapping[str, np.ndarray]:
        place = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        leaves = {name: jax.ShapeDtypeStruct(shapes[name], np.float32, sharding=place) for name in paths}
        tree = reader.restore_part(step, {part: traverse_util.unflatten_dict(leaves, sep="/")})[part]
        return {name: np.asarray(leaf) for name, leaf in traverse_util.flatten_dict(tree, sep="/").items()}

    shapes = vision.shapes()
    return Weights(f"{workdir}:{step}", vision, shapes, read, trained=trained)


def _vision(meta: Mapping[str, Any], workdir: str, step: int) -> tuple[Vision, Trained | None]:
    name = f"{workdir}:{step}"
    if meta["config"]:
        config = read_config(meta["config"], name)
        return vision_of(config), Trained(config, step, workdir)
    try:
        return vision_from_json(meta["extra"]["vision"]), None
    except (KeyError, TypeError) as error:
        raise UserError("the checkpoint says of no encoder what it is", name, "Export it again") from error


def untrained(vision: Vision, seed: int) -> Weights:
    """Fresh parameters of an encoder of these sizes: the floor of whatever training gives."""
    tree = traverse_util.flatten_dict(vision.initial(run_key(seed)), sep="/")
    arrays = {name: np.asarray(leaf) for name, leaf in tree.items()}
    return Weights(f"random:{seed}", vision, vision.shapes(), lambda paths: {name: arrays[name] for name in paths})
