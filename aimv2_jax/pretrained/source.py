"""Opens weights of encoders and of models with a text tower: runs, exports, Hugging Face's and Apple's files."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import traverse_util

from aimv2_jax.checkpoint.checkpointer import CheckpointReader, WeightChoice, param_leaves, params_tree, parse_spec
from aimv2_jax.config.schema import TokenizerConfig
from aimv2_jax.data.tokenizer import load_tokenizer
from aimv2_jax.errors import UserError
from aimv2_jax.pretrained.dual_encoder_spec import DualEncoderSpec, dual_encoder_spec_from_json, dual_encoder_spec_of
from aimv2_jax.pretrained.encoder_spec import EncoderSpec, encoder_spec_from_json, encoder_spec_of
from aimv2_jax.pretrained.hf_import import has_text_tower, is_foreign, read_dual_weights, read_weights
from aimv2_jax.pretrained.lazy_weights import LazyWeights, Spec, TrainingInfo
from aimv2_jax.pretrained.model import TEXT_PROJECTION, read_config
from aimv2_jax.pretrained.tokenizer_file import tokenizer_beside
from aimv2_jax.storage.paths import resolve_path
from aimv2_jax.train.task import run_key

_POOLED_HEAD = "head/pool/query"  # A parameter that only encoders with a pooled head have.
DUAL_ENCODER = "dual_encoder"
"""Key in a checkpoint's metadata for the spec of an exported model with a text tower."""


def open_weights(
    spec: str | Path, heads: int | None = None, weights: WeightChoice = "average"
) -> LazyWeights[EncoderSpec]:
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
    checkpoint = _Checkpoint(spec, heads, weights)
    return checkpoint.weights(checkpoint.encoder_spec())


def open_dual_weights(
    spec: str | Path, heads: int | None = None, weights: WeightChoice = "average"
) -> LazyWeights[DualEncoderSpec]:
    """Opens the model with an image encoder and a text tower that `spec` names; arguments as for `open_weights`.

    Raises:
      UserError: as `open_weights`; also for a model without a text tower.
    """
    if is_foreign(spec):
        return read_dual_weights(spec, heads)
    checkpoint = _Checkpoint(spec, heads, weights)
    if not checkpoint.has_both_towers:
        raise UserError("the model has no text tower", checkpoint.name, "Give a LiT run, its export, or an Aimv2Model")
    weights_of_both = checkpoint.weights(checkpoint.dual_encoder_spec())
    return dataclasses.replace(weights_of_both, tokenizer=checkpoint.tokenizer())


def has_both_towers(spec: str | Path) -> bool:
    """True for a model that `open_dual_weights` opens."""
    return has_text_tower(spec) if is_foreign(spec) else _Checkpoint(spec).has_both_towers


class _Checkpoint:
    """One step of a run, or an export by `--format orbax`."""

    def __init__(self, spec: str | Path, heads: int | None = None, weights: WeightChoice = "average"):
        if heads is not None:
            raise UserError("heads are given for a run, whose config has them", heads, "Leave it out")
        self.workdir, self._step = parse_spec(spec)
        self.name = f"{self.workdir}:{self._step}"
        self._reader = CheckpointReader(self.workdir)
        self._meta = self._reader.meta(self._step)
        self._weights = weights
        self._parameters = frozenset(param_leaves(self._meta).values())
        self._config = read_config(self._meta["config"], self.name) if self._meta["config"] else None

    def encoder_spec(self) -> EncoderSpec:
        """The spec of the encoder, from the run's config or an export's description."""
        if self._config is not None:
            return dataclasses.replace(encoder_spec_of(self._config), head=_POOLED_HEAD in self._parameters)
        return self._described("vision", encoder_spec_from_json)

    @property
    def has_both_towers(self) -> bool:
        """True for a LiT run and for an export with its text tower."""
        return TEXT_PROJECTION in self._parameters

    def dual_encoder_spec(self) -> DualEncoderSpec:
        """The spec of both towers, from an export's description or the run's config and tokenizer."""
        if self._config is None or DUAL_ENCODER in (self._meta["extra"] or {}):
            return self._described(DUAL_ENCODER, dual_encoder_spec_from_json)
        config = dataclasses.replace(self._config, tokenizer=TokenizerConfig(str(self.tokenizer())))
        return dual_encoder_spec_of(config, load_tokenizer(config).end_id)

    def tokenizer(self) -> Path | None:
        """The file of the tokenizer: an export's own, else that of the run."""
        beside = tokenizer_beside(Path(self.workdir))
        return beside if beside is not None or self._config is None else resolve_path(self._config.tokenizer.path)

    def _described(self, key: str, from_json: Callable[[Mapping[str, Any]], Any]) -> Any:
        try:
            return from_json(self._meta["extra"][key])
        except (KeyError, TypeError) as error:
            raise UserError("the checkpoint has no encoder description", self.name, "Export it again") from error

    def weights(self, spec: Spec) -> LazyWeights[Spec]:
        """The parameters of `spec`."""
        training = None
        if self._config is not None:
            evaluated = params_tree(self._meta, self._weights) == params_tree(self._meta)
            training = TrainingInfo(self._config, self._step, self.workdir, evaluated)
        shapes = spec.shapes()
        source = f"from {'the config of' if self._config else 'the description in'} {self.name}"

        def read(paths: Collection[str]) -> Mapping[str, np.ndarray]:
            sharding = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
            leaves = {name: jax.ShapeDtypeStruct(shapes[name], np.float32, sharding=sharding) for name in paths}
            arrays = self._reader.restore_params(self._step, leaves, self._weights)
            return {name: np.asarray(leaf) for name, leaf in arrays.items()}

        return LazyWeights(self.name, spec, shapes, read, training=training, statistics_source=source)


def in_memory(source: str, spec: Spec, arrays: Mapping[str, np.ndarray]) -> LazyWeights[Spec]:
    """Weights of `spec` that are in memory, as {path: array}."""
    shapes = {name: array.shape for name, array in arrays.items()}

    def read(paths: Collection[str]) -> Mapping[str, np.ndarray]:
        return {name: np.asarray(arrays[name], np.float32) for name in paths}

    return LazyWeights(source, spec, shapes, read, statistics_source=f"from {source}")


def untrained(spec: EncoderSpec, seed: int) -> LazyWeights[EncoderSpec]:
    """Newly initialised parameters of an encoder, as a baseline for trained ones."""
    tree = traverse_util.flatten_dict(spec.initial(run_key(seed)), sep="/")
    return in_memory(f"random:{seed}", spec, {name: np.asarray(leaf) for name, leaf in tree.items()})
