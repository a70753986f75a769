"""Loads a trained model from a checkpoint onto the local devices, whatever mesh it was trained on."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
from flax import traverse_util
from jax.sharding import Mesh

from aimv2_jax.checkpoint.checkpointer import CheckpointReader, WeightChoice, param_leaves, parse_spec
from aimv2_jax.config.load import build_config, config_to_dict
from aimv2_jax.config.schema import Config, TokenizerConfig
from aimv2_jax.data.tokenizer import Tokenizer, load_tokenizer
from aimv2_jax.errors import UserError
from aimv2_jax.models.position_embeddings import resize_positions
from aimv2_jax.parallel import rules
from aimv2_jax.parallel.mesh import build_mesh
from aimv2_jax.platforms import skip_absent_tpu
from aimv2_jax.pretrained.tokenizer_file import tokenizer_beside
from aimv2_jax.storage.paths import resolve_path
from aimv2_jax.train.pretrain_task import PretrainTask, build_pretrain_task
from aimv2_jax.train.task import Params, run_key

TEXT_PROJECTION = "text_projection/kernel"
"""A parameter that only models with a text tower have."""


@dataclasses.dataclass(frozen=True)
class Resolution:
    """Centre squares of `image_size` pixels, or whole images in at most `area` patches: one of them is None."""

    image_size: int | None = None
    area: int | None = None

    def __str__(self) -> str:
        return f"native:{self.area}" if self.image_size is None else str(self.image_size)


@dataclasses.dataclass(frozen=True)
class PretrainedModel:
    """A model after `step` steps of the run in `workdir`, with `params` replicated on every device of `mesh`.

    `params` are the run's averaged parameters if it kept them, unless raw ones were requested.
    """

    config: Config
    task: PretrainTask
    params: Params
    workdir: str
    step: int
    mesh: Mesh

    @property
    def name(self) -> str:
        """The `--checkpoint` value for exactly this step."""
        return f"{self.workdir}:{self.step}"

    def put(self, arrays: Any) -> Any:
        """Puts a tree of batch arrays on the devices: rows are split if they divide evenly, else replicated."""
        divides = all(len(leaf) % self.mesh.size == 0 for leaf in jax.tree.leaves(arrays))
        return jax.device_put(arrays, (rules.batch_sharding if divides else rules.replicated)(self.mesh))

    def with_eval(self, **values: Any) -> PretrainedModel:
        """This model with some keys of config `eval` changed."""
        evaluation = dataclasses.replace(self.config.eval, **values)
        return dataclasses.replace(self, config=dataclasses.replace(self.config, eval=evaluation))

    def at_resolution(self, resolution: Resolution) -> PretrainedModel:
        """This model for held-out images of another resolution, to which learned positions are resized.

        Raises:
          UserError: for a resolution that this model does not support.
        """
        tree = config_to_dict(self.config)
        tree["eval"]["area"] = resolution.area
        if resolution.image_size is not None:
            tree["data"]["image_size"] = resolution.image_size
        config = build_config(tree)
        params = self.params
        if config.model.encoder.position == "learned" and config.grid != self.config.grid:
            table = resize_positions(params["encoder"]["position"], self.config.grid, config.grid)
            params = params | {"encoder": params["encoder"] | {"position": table}}
        return dataclasses.replace(self, config=config, task=build_pretrain_task(config), params=params)

    def tokenizer(self) -> Tokenizer:
        """The run's tokenizer, from the config's path or from an export's own file."""
        return load_tokenizer(self.config)

    def tokenizer_file(self) -> tuple[str, bytes]:
        """The usual name and the bytes of the tokenizer's file; raises `UserError` as `tokenizer` does."""
        return self.tokenizer().file_name, resolve_path(self.config.tokenizer.path).read_bytes()


def load(spec: str, weights: WeightChoice = "average") -> PretrainedModel:
    """Loads the model that `spec` names: `WORKDIR` (its best step), `WORKDIR:STEP` or `WORKDIR:last`.

    Reads only one set of parameters, and writes nothing.

    Args:
      spec: as above.
      weights: "average": the average over steps, if config optimizer.ema_decay kept one; "raw": those of that step.

    Raises:
      UserError: for a missing or unreadable checkpoint.
    """
    skip_absent_tpu()
    workdir, step = parse_spec(spec)
    reader = CheckpointReader(workdir)
    meta = reader.meta(step)
    name = f"{workdir}:{step}"
    if TEXT_PROJECTION in param_leaves(meta).values():
        remedy = (
            "Give a pre-training run; load_encoder, load_dual_encoder, eval.zeroshot and eval.retrieval take this one"
        )
        raise UserError("a LiT run has no decoder", name, remedy)
    if not any(leaf.startswith("params/decoder/") for leaf in meta["leaves"]):
        raise UserError("--checkpoint is an encoder alone", name, "Give a training run, or an export with --whole")
    config = _as_pretraining(read_config(meta["config"], name))
    exported_tokenizer = tokenizer_beside(Path(workdir))
    if exported_tokenizer is not None:
        config = dataclasses.replace(config, tokenizer=TokenizerConfig(str(exported_tokenizer)))
    task = build_pretrain_task(config)
    mesh = build_mesh(1, -1, 1, 1, jax.local_devices())
    shapes = traverse_util.flatten_dict(jax.eval_shape(task.init, run_key(0)), sep="/")
    wanted = {
        path: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=rules.replicated(mesh))
        for path, leaf in shapes.items()
    }
    params = traverse_util.unflatten_dict(reader.restore_params(step, wanted, weights), sep="/")
    return PretrainedModel(config, task, params, workdir, step, mesh)


# Keys that earlier versions did not have, by group, with the values that do what those versions did.
_ADDED: dict[str, dict[str, Any]] = {"train": {"gpu_compiler_options": {}}}


def _as_pretraining(config: Config) -> Config:
    """The config of a distilled student as if it had been pre-trained, with the losses whose outputs it learnt."""
    if config.task != "distill":
        return config
    loss = config.loss
    if config.outputs:
        loss = dataclasses.replace(loss, image="pixels" in config.outputs, text="logits" in config.outputs)
    return dataclasses.replace(config, task="pretrain", loss=loss)


def read_config(saved: Mapping[str, Any], name: str) -> Config:
    """The config of a checkpoint, also of an earlier version that lacked a key of `_ADDED`.

    Raises:
      UserError: if this version of aimv2_jax has other keys.
    """
    tree = dict(saved)
    for group, added in _ADDED.items():
        if isinstance(tree.get(group), Mapping):
            tree[group] = {**added, **tree[group]}
    try:
        return build_config(tree)
    except UserError as error:
        what = f"the config of checkpoint {name} does not fit this version of aimv2_jax: {error.what}"
        raise UserError(what, error.value, "Read it with the aimv2_jax that wrote it") from error


def check_held_out(loaded: PretrainedModel) -> None:
    """Raises `UserError` for a run without held-out images."""
    if not loaded.config.eval.sources:
        raise UserError(
            "the run has no held-out images: config eval.sources is empty",
            loaded.workdir,
            "Give a run that was trained with eval.sources set",
        )
