"""A trained model from a checkpoint, on the devices that are here, however many it was trained on."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import jax
from jax.sharding import Mesh

from aimv2_jax.config import Config, TokenizerConfig, build_config, build_saved_config, config_to_dict
from aimv2_jax.data.locations import locate
from aimv2_jax.data.tokenizer import Tokenizer
from aimv2_jax.errors import UserError
from aimv2_jax.models.positions import resize_positions
from aimv2_jax.parallel import rules
from aimv2_jax.parallel.mesh import build_mesh
from aimv2_jax.platforms import skip_absent_tpu
from aimv2_jax.train.checkpoint import CheckpointReader, has_average, parse_spec
from aimv2_jax.train.task import Params, PretrainTask, build_task, run_key

Choice = Literal["average", "raw"]
"""Which parameters of a run that kept an average."""

TOKENIZER = "tokenizer.model"
"""In the folder of an export with `--whole`: the run's tokenizer, wherever that was."""


@dataclasses.dataclass(frozen=True)
class Loaded:
    """A model as it was after `step` steps of the run in `workdir`; `params` are whole on every device of `mesh`.

    `params` are the average that the run kept, where it kept one and the last step's were not asked for.
    """

    config: Config
    task: PretrainTask
    params: Params
    workdir: str
    step: int
    mesh: Mesh

    @property
    def name(self) -> str:
        """What `--checkpoint` takes for just this step."""
        return f"{self.workdir}:{self.step}"

    def put(self, arrays: Any) -> Any:
        """A tree of a batch's arrays on the devices: rows split among them, or whole on each if that doesn't divide."""
        divides = all(len(leaf) % self.mesh.size == 0 for leaf in jax.tree.leaves(arrays))
        return jax.device_put(arrays, (rules.batch_sharding if divides else rules.replicated)(self.mesh))

    def with_eval(self, **values: Any) -> Loaded:
        """The same, with some keys of config `eval` changed."""
        evaluation = dataclasses.replace(self.config.eval, **values)
        return dataclasses.replace(self, config=dataclasses.replace(self.config, eval=evaluation))

    def seen_at(self, resolution: str) -> Loaded:
        """The same model on held-out pictures of another resolution, to which learned positions are resized.

        Args:
          resolution: "336" for centre squares of 336 pixels; "native:256" for whole pictures in at most 256 patches.

        Raises:
          UserError: where it is neither, or none that this model can see.
        """
        native, _, number = resolution.rpartition(":")
        if not number.isdecimal() or native not in ("", "native"):
            raise UserError("--resolution is unknown", resolution, "Give pixels such as 336, or native:256 (patches)")
        tree = config_to_dict(self.config)
        tree["eval"]["area"] = int(number) if native else None
        if not native:
            tree["data"]["image_size"] = int(number)
        config = build_config(tree)
        params = self.params
        if config.model.encoder.position == "learned" and config.grid != self.config.grid:
            table = resize_positions(params["encoder"]["position"], self.config.grid, config.grid)
            params = params | {"encoder": params["encoder"] | {"position": table}}
        return dataclasses.replace(self, config=config, task=build_task(config), params=params)

    def tokenizer(self) -> Tokenizer:
        """The tokenizer of the run; its file lies where the config says, or came with an export."""
        config, decoder = self.config, self.config.model.decoder
        return Tokenizer(config.tokenizer.path, decoder.text_length, decoder.vocab_size, config.loss.predict_eos)

    def tokenizer_file(self) -> bytes:
        """The tokenizer's file; raises `UserError` as `tokenizer` where there is none that fits."""
        self.tokenizer()
        return locate(self.config.tokenizer.path).read_bytes()


def load(spec: str, weights: Choice = "average") -> Loaded:
    """The model that `spec` names: `WORKDIR` (its best step), `WORKDIR:STEP` or `WORKDIR:last`.

    Reads one set of parameters alone, and writes nothing.

    Args:
      spec: as above.
      weights: "average": over the steps, where config optimizer.ema_decay kept one; "raw": those of that very step.

    Raises:
      UserError: when there is no such checkpoint, or it cannot be read.
    """
    skip_absent_tpu()
    workdir, step = parse_spec(spec)
    reader = CheckpointReader(workdir)
    meta = reader.meta(step)
    name = f"{workdir}:{step}"
    if not any(leaf.startswith("params/decoder/") for leaf in meta["leaves"]):
        raise UserError("--checkpoint is an encoder alone", name, "Give a training run, or an export with --whole")
    config = read_config(meta["config"], name)
    beside = Path(workdir) / TOKENIZER
    if beside.is_file():
        config = dataclasses.replace(config, tokenizer=TokenizerConfig(str(beside)))
    task = build_task(config)
    mesh = build_mesh(1, -1, 1, 1, jax.local_devices())
    shapes = jax.eval_shape(task.init, run_key(0))
    abstract = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=rules.replicated(mesh)), shapes
    )
    part = "average" if weights == "average" and has_average(meta) else "params"
    params = reader.restore_part(step, {part: abstract})[part]
    return Loaded(config, task, params, workdir, step, mesh)


def read_config(saved: Mapping[str, Any], name: str) -> Config:
    """The config that a checkpoint holds; raises `UserError` where this aimv2_jax has other keys."""
    try:
        return build_saved_config(saved)
    except UserError as error:
        what = f"the config of checkpoint {name} is not one of this aimv2_jax: {error.what}"
        raise UserError(what, error.value, "Read it with the aimv2_jax that wrote it") from error


def check_held_out(loaded: Loaded) -> None:
    """Raises `UserError` where the run has no held-out pictures."""
    if not loaded.config.eval.sources:
        raise UserError(
            "the run has no held-out pictures: config eval.sources is empty",
            loaded.workdir,
            "Give a run that was trained with eval.sources set",
        )
