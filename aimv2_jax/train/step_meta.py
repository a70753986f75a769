"""What is known of a saved step beside its arrays: its meta, whether its files are intact, and how good it is."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.metadata
import json
import platform
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
from etils import epath

from aimv2_jax import __version__
from aimv2_jax.errors import UserError
from aimv2_jax.files import read_whole
from aimv2_jax.train import manifest as manifests
from aimv2_jax.train.manifest import Manifest, Wrong
from aimv2_jax.train.step_folders import MAX_META_BYTES, META, committed_steps, place
from aimv2_jax.train.words import first_line
from aimv2_jax.untrusted import as_int, parse_json_object

FORMAT_VERSION = 2  # Format 1 had no manifest, and no leaves below `guard/`.
_NEWEST = 2**63 - 1  # Format or step that a record may name.
_SHOWN = 3  # Files that an error names.


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """A held-out loss, and what it was measured on: only losses on the same can be compared."""

    loss: float
    conditions: str


class StepVanished(UserError):
    """The step isn't there."""

    def __init__(self, folder: epath.Path, step: int):
        super().__init__(f"no checkpoint of this step in {folder}", step, there(committed_steps(folder)))


class DamagedStep(UserError):
    """Files of the step are not what was saved; `wrong` names them all."""

    def __init__(self, folder: epath.Path, step: int, wrong: Sequence[Wrong]):
        self.step, self.wrong = step, tuple(wrong)
        super().__init__(
            f"damaged checkpoint: {place(folder, step)}",
            shortened(wrong),
            "Name another step; the run itself sets it aside when it is started again, and goes on from the newest "
            "intact one",
        )


def shortened(wrong: Sequence[Wrong]) -> str:
    """The first of what is wrong, in words."""
    more = f"; and {len(wrong) - _SHOWN} more" if len(wrong) > _SHOWN else ""
    return "; ".join(map(str, wrong[:_SHOWN])) + more


def about(meta: Mapping[str, Any]) -> dict[str, Any]:
    """What the manifest of the step says of it, beside its files."""
    config = json.dumps(meta["config"], sort_keys=True)
    packages = ("jax", "jaxlib", "flax", "orbax-checkpoint", "numpy")
    return {
        "format_version": meta["format_version"],
        "step": meta["step"],
        "config_sha256": hashlib.sha256(config.encode()).hexdigest(),
        "versions": {
            "aimv2_jax": __version__,
            "python": platform.python_version(),
            **{name: importlib.metadata.version(name) for name in packages},
        },
        "leaves": {path: _array(leaf) for path, leaf in meta["leaves"].items()},
    }


def read_meta(folder: epath.Path, step: int) -> dict[str, Any]:
    """The meta of a step, whose file is compared with the manifest; raises as `CheckpointReader.meta`."""
    path = place(folder, step)
    try:
        data = read_whole(path / META, MAX_META_BYTES)
    except (FileNotFoundError, NotADirectoryError) as error:
        if step in committed_steps(folder):
            raise DamagedStep(folder, step, [Wrong(META, manifests.MISSING)]) from error
        raise StepVanished(folder, step) from error
    except ValueError as error:
        raise DamagedStep(folder, step, [Wrong(META, first_line(error))]) from error
    manifest = read_manifest(folder, step)
    if manifest is not None:
        entry = manifest.files.get(META)
        what = manifests.EXTRA if entry is None else manifests.check_bytes(data, entry)
        if what is not None:
            raise DamagedStep(folder, step, [Wrong(META, what)])
    try:
        meta = parse_json_object(data)
        version = as_int(meta["format_version"], 1, _NEWEST)
        if version <= FORMAT_VERSION:
            _check_meta(meta)
    except (ValueError, KeyError, TypeError) as error:
        raise DamagedStep(folder, step, [Wrong(META, f"cannot be understood ({first_line(error)})")]) from error
    _refuse_newer(path, version)
    if manifest is None and version > 1:
        if step not in committed_steps(folder):
            raise StepVanished(folder, step)
        raise DamagedStep(folder, step, [Wrong(manifests.NAME, manifests.MISSING)])
    return meta


def _check_meta(meta: Mapping[str, Any]) -> None:
    """Raises `ValueError`, `KeyError` or `TypeError` where `meta` is not what a save writes."""
    dict(meta["config"])
    for path, (shape, dtype) in dict(meta["leaves"]).items():
        if not isinstance(dtype, str) or not all(isinstance(size, int) for size in shape):
            raise ValueError(f"no shape and dtype of {path}")
    evaluated = evaluation(meta)
    if evaluated is not None and not isinstance(evaluated.loss, (int, float)):
        raise ValueError("eval_loss is no number")


def verify(folder: epath.Path, step: int, progress: Callable[[int], None] | None = None) -> Manifest | None:
    """Compares all files of a step with its manifest, which it returns; None for a step of format 1, which has none.

    Args:
      folder: of all steps.
      step: one of them.
      progress: is told the number of bytes that were read since it was told before.

    Raises:
      DamagedStep: when a file is missing, extra or not what was saved.
      StepVanished: when the step isn't there, or is deleted by its trainer meanwhile.
      UserError: when a newer version wrote it.
    """
    path = place(folder, step)
    manifest = read_manifest(folder, step)
    if manifest is None:
        read_meta(folder, step)
        return None
    wrong = manifests.compare(path, manifest, progress) if path.is_dir() else [Wrong(META, manifests.MISSING)]
    if not wrong:
        return manifest
    if step not in committed_steps(folder):
        raise StepVanished(folder, step)
    if read_manifest(folder, step) != manifest:  # Set aside and saved again by its trainer.
        return verify(folder, step, progress)
    raise DamagedStep(folder, step, wrong)


def read_manifest(folder: epath.Path, step: int) -> Manifest | None:
    path = place(folder, step)
    try:
        manifest = manifests.read(path)
        if manifest is None:
            return None
        version, whose = (as_int(manifest.about[key], 0, _NEWEST) for key in ("format_version", "step"))
    except (ValueError, KeyError, TypeError) as error:
        raise DamagedStep(folder, step, [Wrong(manifests.NAME, first_line(error))]) from error
    _refuse_newer(path, version)
    if whose != step:
        raise DamagedStep(folder, step, [Wrong(manifests.NAME, f"that of step {whose}")])
    return manifest


def _refuse_newer(path: epath.Path, version: int) -> None:
    if version > FORMAT_VERSION:
        raise UserError(
            f"checkpoint {path} was written by a newer aimv2_jax",
            f"format {version}, this one reads up to {FORMAT_VERSION}",
            "Update aimv2_jax",
        )


# --- which is best -------------------------------------------------------------------------------------------------


def evaluation(meta: Mapping[str, Any]) -> Evaluation | None:
    if meta["eval_loss"] is None:
        return None
    return Evaluation(meta["eval_loss"], json.dumps(measured_on(meta["config"]["eval"]), sort_keys=True))


def measured_on(settings: Mapping[str, Any]) -> dict[str, Any]:
    """What of config `eval`, as a plain dict, a held-out loss depends on: a set may move, its name tells what it is."""
    return {**settings, "batch_size": None, "sources": sorted(settings["sources"])}


def best(record: Mapping[int, Evaluation | None]) -> int | None:
    """The step with the lowest loss among those measured as the newest is."""
    evaluated = {step: evaluation for step, evaluation in record.items() if evaluation is not None}
    if not evaluated:
        return None
    conditions = evaluated[max(evaluated)].conditions
    return min((value.loss, step) for step, value in evaluated.items() if value.conditions == conditions)[1]


# --- its arrays ----------------------------------------------------------------------------------------------------


def leaves(tree: Any) -> dict[str, list]:
    """`{"params/encoder/...": [shape, dtype]}` of every array."""
    return {
        leaf_path(path): [list(leaf.shape), str(leaf.dtype)] for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }


def leaf_path(path: tuple) -> str:
    return jax.tree_util.keystr(path, simple=True, separator="/")


def check_leaves(step: int, saved: Mapping[str, list], wanted: Mapping[str, list], partial: bool) -> None:
    """Raises `UserError`, with the path, where an array is missing, extra (unless `partial`), or another."""
    differences = [f"{path} is not in it" for path in wanted if path not in saved]
    if not partial:
        differences += [f"{path} is in it and not in this model" for path in saved if path not in wanted]
    differences += [
        f"{path} is {_array(saved[path])} in it, {_array(wanted[path])} here"
        for path in wanted
        if path in saved and saved[path] != wanted[path]
    ]
    if differences:
        more = f", and {len(differences) - 1} more" if len(differences) > 1 else ""
        raise UserError(
            f"checkpoint of step {step} is of a different model",
            differences[0] + more,
            "Use the config it was made with, or another --workdir",
        )


def _array(leaf: list) -> str:
    shape, dtype = leaf
    return f"{dtype}[{','.join(map(str, shape))}]"


# --- words ---------------------------------------------------------------------------------------------------------


def there(steps: list[int]) -> str:
    return f"Steps that are there: {', '.join(map(str, steps))}" if steps else "There is none; give another folder"
