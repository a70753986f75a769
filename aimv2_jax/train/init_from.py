"""Initialises a run from the parameters of another model: which tensors are loaded, resized, initialised or ignored.

Nothing is guessed: the config must name each tensor that either side lacks, and each name there must match a tensor.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, Protocol

import jax
from flax import traverse_util

from aimv2_jax.checkpoint.checkpointer import CheckpointReader, param_leaves, parse_spec
from aimv2_jax.config.schema import InitConfig
from aimv2_jax.data.identity import TOKENIZER
from aimv2_jax.errors import UserError
from aimv2_jax.models.position_embeddings import resize_positions
from aimv2_jax.parallel import rules
from aimv2_jax.train.builder import TrainSetup
from aimv2_jax.train.distill_task import TEACHER
from aimv2_jax.train.task import Params

POSITION = "encoder/position"
"""The only tensor that is resized: the encoder's learned position table, one row per patch of a square grid."""

TOKENIZER_TENSORS = ("token_table", "token_head/kernel")
"""Ends of the paths of tensors whose rows or columns belong to the tokenizer's pieces, in decoders and text towers."""

_MAX_NAMES = 6  # Names in a line of the report.


@dataclasses.dataclass(frozen=True)
class Matching:
    """How each tensor is initialised, by path ("encoder/trunk/norm/scale").

    Attributes:
      taken: tensors of this model that are loaded as they are.
      resized: tensors of this model that are loaded and resized.
      initialised: tensors of this model that keep their fresh values.
      dropped: tensors of the other model that are not loaded.
    """

    taken: tuple[str, ...]
    resized: tuple[str, ...]
    initialised: tuple[str, ...]
    dropped: tuple[str, ...]


class WeightSource(Protocol):
    """A source of initial weights.

    Attributes:
      name: for the log.
      shapes: of its tensors, by path.
      tokenizer: digest of its tokenizer (as in `data.identity`), None if unknown.

    `read` takes `{path: jax.ShapeDtypeStruct}`, and returns the arrays with the shardings given there.
    """

    name: str
    shapes: Mapping[str, tuple[int, ...]]
    tokenizer: str | None

    def read(self, wanted: Mapping[str, jax.ShapeDtypeStruct]) -> Mapping[str, jax.Array]: ...


class RunWeights:
    """Weights of another run, or of an export in the layout of a run: `RUN`, `RUN:STEP` or `RUN:last`.

    Where the run kept an average of its parameters, the average is read: its evaluations measured that. The teacher of
    a distillation is another model, and is left out.

    Args:
      path: as above.
      key: the config key that gave it, for errors.

    Raises:
      UserError: for a path without a checkpoint.
    """

    def __init__(self, path: str, key: str = "config init.path"):
        workdir, self._step = parse_spec(path, key)
        self._reader = CheckpointReader(workdir)
        meta = self._reader.meta(self._step)
        leaves = meta["leaves"]
        self.name = f"{workdir}:{self._step}"
        self.tokenizer = (meta["extra"].get("data") or {}).get(TOKENIZER)
        paths = {leaf: path for leaf, path in param_leaves(meta).items() if not path.startswith(f"{TEACHER}/")}
        self.shapes = {path: tuple(leaves[leaf][0]) for leaf, path in paths.items()}

    def read(self, wanted: Mapping[str, jax.ShapeDtypeStruct]) -> Mapping[str, jax.Array]:
        return self._reader.restore_params(self._step, wanted)


def warm_start(
    setup: TrainSetup, params: Any, init: InitConfig, source: WeightSource, tokenizer: str | None = None
) -> tuple[Any, str]:
    """Replaces fresh parameters by those of the source; returns them with a report for the log.

    Args:
      params: the fresh parameters, trained and frozen.
      tokenizer: digest of this run's tokenizer, which is compared with the source's where both are known.

    Raises:
      UserError: for tensors that are missing, left over or of another shape and not named in `init`; for names there
        that match no tensor; for tensors of another tokenizer.
    """
    ours = traverse_util.flatten_dict(params, sep="/")
    matching = match({name: leaf.shape for name, leaf in ours.items()}, source.shapes, init)
    differs = tokenizer and source.tokenizer and tokenizer != source.tokenizer
    of_tokenizer = tuple(name for name in matching.taken if name.endswith(TOKENIZER_TENSORS))
    if differs and of_tokenizer:
        raise UserError(
            f"the token table of {source.name} belongs to another tokenizer",
            f"digest {source.tokenizer} there, {tokenizer} here",
            f"Set tokenizer.path to that tokenizer, or init.ignore and init.reinit to {of_tokenizer}",
        )
    replicated = rules.replicated(setup.mesh)
    theirs = dict(
        source.read(
            {
                name: jax.ShapeDtypeStruct(
                    source.shapes[name],
                    ours[name].dtype,
                    sharding=replicated if name in matching.resized else ours[name].sharding,
                )
                for name in (*matching.taken, *matching.resized)
            }
        )
    )
    report = [f"parameters of {source.name}: {len(matching.taken)} tensors loaded"]
    for name in matching.resized:
        grid, new_grid = _square(source.shapes[name][0]), _square(ours[name].shape[0])
        resize = partial(resize_positions, grid=grid, new_grid=new_grid)
        theirs[name] = jax.jit(resize, out_shardings=ours[name].sharding)(theirs[name])
        report.append("resized: {}, {} x {} to {} x {} patches".format(name, *grid, *new_grid))
    for what, names in (("initialised", matching.initialised), ("ignored", matching.dropped)):
        if names:
            report.append(f"{what}: {_listed(names)}")
    return traverse_util.unflatten_dict(ours | theirs, sep="/"), "\n  ".join(report)


def check_teacher(setup: TrainSetup, source: WeightSource, tokenizer: str) -> None:
    """Raises UserError unless the source has every tensor of the run's teacher, and its tokenizer where known.

    Args:
      source: with the names of a model of its own ("encoder/…", "decoder/…").
      tokenizer: digest of this run's tokenizer.
    """
    for name, leaf in _teacher(setup).items():
        if source.shapes.get(name) != leaf.shape:
            raise UserError(
                f"config distill.path has no teacher of the sizes in config distill: {name} differs",
                f"{source.shapes.get(name, 'absent')} there, {leaf.shape} here",
                "Set distill.encoder and distill.decoder to the teacher's sizes",
            )
    if "logits" in setup.config.teacher_outputs and source.tokenizer not in (None, tokenizer):
        raise UserError(
            "config distill.logits compares text logits, and distill.path was trained with another tokenizer",
            f"digest {source.tokenizer} there, {tokenizer} here",
            "Set tokenizer.path to that tokenizer, or distill.logits=0",
        )


def read_teacher(setup: TrainSetup, source: WeightSource) -> tuple[Params, str]:
    """Reads the run's teacher from a source that `check_teacher` accepts; returns it with a report for the log."""
    wanted = _teacher(setup)
    tree = traverse_util.unflatten_dict(dict(source.read(wanted)), sep="/")
    return tree, f"teacher: {len(wanted)} tensors of {source.name}"


def _teacher(setup: TrainSetup) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes and shardings of the teacher's parameters by path, without the name of the teacher."""
    return traverse_util.flatten_dict(setup.abstract_state.frozen[TEACHER], sep="/")


def match(ours: Mapping[str, tuple[int, ...]], theirs: Mapping[str, tuple[int, ...]], init: InitConfig) -> Matching:
    """Decides for every tensor how it is initialised, from the shapes of both models; raises as `warm_start`."""
    scope = "" if init.parts == "model" else f"{init.parts}/"
    fresh = [name for name in ours if not name.startswith(scope) or _named(name, init.reinit)]
    wanted = [name for name in ours if name not in fresh]
    dropped = [name for name in theirs if name not in wanted]
    _check_names("init.reinit", init.reinit, ours)
    _check_names("init.ignore", init.ignore, theirs)
    for name in dropped:
        if name.startswith(scope) and not _named(name, (*init.ignore, *init.reinit)):
            raise UserError(
                "config init.path has a tensor that this model lacks",
                name,
                f"Ignore it by init.ignore=({name!r},)",
            )
    for name in wanted:
        if name not in theirs or _named(name, init.ignore):
            remedy = f"Initialise it by init.reinit=({name!r},)"
            raise UserError("this model has a tensor that config init.path lacks", name, remedy)
        if theirs[name] != ours[name] and not _resizable(name, theirs[name], ours[name]):
            raise UserError(
                f"config init.path has {name} in another shape",
                f"{theirs[name]} there, {ours[name]} here",
                f"Set the config to the sizes of that model, or initialise it by init.reinit=({name!r},)",
            )
    resized = [name for name in wanted if theirs[name] != ours[name]]
    taken = [name for name in wanted if name not in resized]
    return Matching(tuple(taken), tuple(resized), tuple(fresh), tuple(dropped))


def _named(name: str, names: Sequence[str]) -> bool:
    """Whether `name` is one of `names`, or below one of them in the tree."""
    return any(name == prefix or name.startswith(f"{prefix}/") for prefix in names)


def _check_names(key: str, names: Sequence[str], tensors: Mapping[str, Any]) -> None:
    for prefix in names:
        if not any(_named(name, (prefix,)) for name in tensors):
            raise UserError(f"config {key} names no tensor", prefix, f"The tensors are {_listed(sorted(tensors))}")


def _resizable(name: str, theirs: tuple[int, ...], ours: tuple[int, ...]) -> bool:
    squares = all(math.isqrt(shape[0]) ** 2 == shape[0] for shape in (theirs, ours))
    return name == POSITION and squares and theirs[1:] == ours[1:]


def _square(length: int) -> tuple[int, int]:
    return math.isqrt(length), math.isqrt(length)


def _listed(names: Sequence[str]) -> str:
    more = f", and {len(names) - _MAX_NAMES} more" if len(names) > _MAX_NAMES else ""
    return ", ".join(names[:_MAX_NAMES]) + more
