"""Starting a run from the parameters of another: what is taken, resized, initialised, and left there.

Nothing is guessed: a tensor that either side lacks must be named in the config, and every name there must be of use.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, Protocol

import jax
from flax import traverse_util

from aimv2_jax.config import InitConfig
from aimv2_jax.data.identity import TOKENIZER
from aimv2_jax.errors import UserError
from aimv2_jax.models.positions import resize_positions
from aimv2_jax.parallel import rules
from aimv2_jax.train.checkpoint import CheckpointReader, has_average, parse_spec
from aimv2_jax.train.program import Program

POSITION = "encoder/position"
"""The one tensor that is resized: the encoder's table of learned positions, a row a patch of a square grid."""

OF_TOKENS = ("decoder/token_table", "decoder/token_head/kernel")
"""The tensors whose rows or columns are the pieces of a tokenizer."""

_SHOWN = 6  # Names in a line of the report.


@dataclasses.dataclass(frozen=True)
class Matching:
    """Which of this model's tensors come from where, by their paths ("encoder/trunk/norm/scale").

    `dropped` are the other model's tensors that nothing here takes.
    """

    taken: tuple[str, ...]
    resized: tuple[str, ...]
    initialised: tuple[str, ...]
    dropped: tuple[str, ...]


class Donor(Protocol):
    """What has parameters to give: `name` for the log, `shapes` by path, and a way to read some of them.

    `tokenizer` is the digest of the one that its tokens are of (as `data.identity` has it), None if that is not known.

    `read` takes `{path: jax.ShapeDtypeStruct}`, and gives the arrays placed as their shardings say.
    """

    name: str
    shapes: Mapping[str, tuple[int, ...]]
    tokenizer: str | None

    def read(self, wanted: Mapping[str, jax.ShapeDtypeStruct]) -> Mapping[str, jax.Array]: ...


class RunDonor:
    """Another run of ours, or an export in the layout of one, as `RUN`, `RUN:STEP` or `RUN:last`.

    Where the run kept an average of its parameters, that is what it gives: what its evaluations measured.

    Raises:
      UserError: for a path without a checkpoint.
    """

    def __init__(self, path: str):
        workdir, self._step = parse_spec(path, "config init.path")
        self._reader = CheckpointReader(workdir)
        meta = self._reader.meta(self._step)
        leaves = meta["leaves"]
        self.name = f"{workdir}:{self._step}"
        self.tokenizer = (meta["extra"].get("data") or {}).get(TOKENIZER)
        self._part = "average" if has_average(meta) else "params"
        prefix = f"{self._part}/"
        self.shapes = {name.removeprefix(prefix): tuple(leaves[name][0]) for name in leaves if name.startswith(prefix)}

    def read(self, wanted: Mapping[str, jax.ShapeDtypeStruct]) -> Mapping[str, jax.Array]:
        tree = {self._part: traverse_util.unflatten_dict(wanted, sep="/")}
        return traverse_util.flatten_dict(self._reader.restore_part(self._step, tree)[self._part], sep="/")


def warm_start(
    program: Program, params: Any, init: InitConfig, donor: Donor, tokenizer: str | None = None
) -> tuple[Any, str]:
    """`params`, fresh ones, with those of the donor in their place, and a report for the log.

    Args:
      tokenizer: its digest, which is compared with the donor's where both are known.

    Raises:
      UserError: for tensors that are missing, left over or of another shape and not named in `init`; for names there
        that match none; for tensors that belong to another tokenizer.
    """
    ours = traverse_util.flatten_dict(params, sep="/")
    found = match({name: leaf.shape for name, leaf in ours.items()}, donor.shapes, init)
    if tokenizer and donor.tokenizer and tokenizer != donor.tokenizer and set(OF_TOKENS) & set(found.taken):
        raise UserError(
            f"the token table of {donor.name} is of another tokenizer",
            f"digest {donor.tokenizer} there, {tokenizer} here",
            f"Set tokenizer.path to that one, or init.drop and init.fresh to {OF_TOKENS}",
        )
    whole = rules.replicated(program.mesh)
    theirs = dict(
        donor.read(
            {
                name: jax.ShapeDtypeStruct(
                    donor.shapes[name],
                    ours[name].dtype,
                    sharding=whole if name in found.resized else ours[name].sharding,
                )
                for name in (*found.taken, *found.resized)
            }
        )
    )
    report = [f"parameters of {donor.name}: {len(found.taken)} tensors taken"]
    for name in found.resized:
        grid, new_grid = _square(donor.shapes[name][0]), _square(ours[name].shape[0])
        resize = partial(resize_positions, grid=grid, new_grid=new_grid)
        theirs[name] = jax.jit(resize, out_shardings=ours[name].sharding)(theirs[name])
        report.append("resized: {}, {} x {} to {} x {} patches".format(name, *grid, *new_grid))
    for what, names in (("initialised", found.initialised), ("left there", found.dropped)):
        if names:
            report.append(f"{what}: {_listed(names)}")
    return traverse_util.unflatten_dict(ours | theirs, sep="/"), "\n  ".join(report)


def match(ours: Mapping[str, tuple[int, ...]], theirs: Mapping[str, tuple[int, ...]], init: InitConfig) -> Matching:
    """What becomes of every tensor, from the shapes of both models; raises as `warm_start`."""
    scope = "" if init.parts == "model" else f"{init.parts}/"
    fresh = [name for name in ours if not name.startswith(scope) or _named(name, init.fresh)]
    wanted = [name for name in ours if name not in fresh]
    dropped = [name for name in theirs if name not in wanted]
    _check_names("init.fresh", init.fresh, ours)
    _check_names("init.drop", init.drop, theirs)
    for name in dropped:
        if name.startswith(scope) and not _named(name, (*init.drop, *init.fresh)):
            raise UserError(
                "config init.path has a tensor that this model lacks", name, f"Leave it there by init.drop=({name!r},)"
            )
    for name in wanted:
        if name not in theirs or _named(name, init.drop):
            remedy = f"Start it as initialised by init.fresh=({name!r},)"
            raise UserError("this model has a tensor that config init.path lacks", name, remedy)
        if theirs[name] != ours[name] and not _resizable(name, theirs[name], ours[name]):
            raise UserError(
                f"config init.path has {name} in another shape",
                f"{theirs[name]} there, {ours[name]} here",
                f"Set the config to the sizes of that model, or start it as initialised by init.fresh=({name!r},)",
            )
    resized = [name for name in wanted if theirs[name] != ours[name]]
    taken = [name for name in wanted if name not in resized]
    return Matching(tuple(taken), tuple(resized), tuple(fresh), tuple(dropped))


def _named(name: str, names: Sequence[str]) -> bool:
    """Whether `name` is among `names`, or below one of them."""
    return any(name == one or name.startswith(f"{one}/") for one in names)


def _check_names(key: str, names: Sequence[str], tensors: Mapping[str, Any]) -> None:
    for one in names:
        if not any(_named(name, (one,)) for name in tensors):
            raise UserError(f"config {key} names no tensor", one, f"There is {_listed(sorted(tensors))}")


def _resizable(name: str, theirs: tuple[int, ...], ours: tuple[int, ...]) -> bool:
    squares = all(math.isqrt(shape[0]) ** 2 == shape[0] for shape in (theirs, ours))
    return name == POSITION and squares and theirs[1:] == ours[1:]


def _square(length: int) -> tuple[int, int]:
    return math.isqrt(length), math.isqrt(length)


def _listed(names: Sequence[str]) -> str:
    more = f", and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more
