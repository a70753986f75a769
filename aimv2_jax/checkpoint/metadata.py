"""Metadata, verification and evaluation of a saved step; everything except its arrays."""

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

from aimv2_jax.checkpoint import manifest as manifests
from aimv2_jax.checkpoint.layout import MAX_META_BYTES, META, committed_steps, step_path
from aimv2_jax.checkpoint.manifest import FileProblem, Hashes, Manifest
from aimv2_jax.errors import UserError, first_line
from aimv2_jax.storage.files import read_bytes
from aimv2_jax.untrusted import as_int, parse_json_object
from aimv2_jax.version import __version__

FORMAT_VERSION = 5  # The only format that is read and written. Formats 1 to 4 were never released.
_MAX_INT = 2**63 - 1  # Bound on the format and the step in a record.
_MAX_SHOWN_FILES = 3  # Number of files in an error message.


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """A held-out loss with the conditions of its measurement; only losses with equal conditions are comparable."""

    loss: float
    conditions: str


class StepVanished(UserError):
    """The step does not exist, or was deleted meanwhile."""

    def __init__(self, folder: epath.Path, step: int):
        super().__init__(f"no checkpoint of this step in {folder}", step, list_steps(committed_steps(folder)))


class DamagedStep(UserError):
    """Files of the step differ from what was saved; `wrong` lists them all."""

    def __init__(self, folder: epath.Path, step: int, wrong: Sequence[FileProblem]):
        self.step = step
        self.wrong = tuple(wrong)
        super().__init__(
            f"damaged checkpoint: {step_path(folder, step)}",
            summarize(wrong),
            "Name another step; the run itself sets this one aside at its next start, and goes on from the newest "
            "intact one",
        )


def summarize(wrong: Sequence[FileProblem]) -> str:
    """The first problems as text, and the number of the others."""
    more = f"; and {len(wrong) - _MAX_SHOWN_FILES} more" if len(wrong) > _MAX_SHOWN_FILES else ""
    return "; ".join(map(str, wrong[:_MAX_SHOWN_FILES])) + more


def manifest_header(meta: Mapping[str, Any]) -> dict[str, Any]:
    """Header of the step's manifest: format, step, hash of the config, package versions and arrays."""
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
    """Reads the metadata of a step and compares its file with the manifest; raises as `CheckpointReader.meta`."""
    path = step_path(folder, step)
    try:
        data = read_bytes(path / META, MAX_META_BYTES)
    except (FileNotFoundError, NotADirectoryError) as error:
        if step in committed_steps(folder):
            raise DamagedStep(folder, step, [FileProblem(META, manifests.MISSING)]) from error
        raise StepVanished(folder, step) from error
    except ValueError as error:
        raise DamagedStep(folder, step, [FileProblem(META, first_line(error))]) from error
    manifest = read_manifest(folder, step)
    if manifest is not None:
        what = manifests.check_bytes(data, META, manifest, read_hashes(folder, step, manifest))
        if what is not None:
            raise DamagedStep(folder, step, [FileProblem(META, what)])
    try:
        meta = parse_json_object(data)
        version = as_int(meta["format_version"], 1, _MAX_INT)
        if version == FORMAT_VERSION:
            _check_meta(meta)
    except (ValueError, KeyError, TypeError) as error:
        raise DamagedStep(folder, step, [FileProblem(META, f"cannot be understood ({first_line(error)})")]) from error
    _refuse_other_format(path, version)
    if manifest is None:
        if step not in committed_steps(folder):
            raise StepVanished(folder, step)
        raise DamagedStep(folder, step, [FileProblem(manifests.NAME, manifests.MISSING)])
    return meta


def _check_meta(meta: Mapping[str, Any]) -> None:
    """Raises `ValueError`, `KeyError` or `TypeError` if `meta` has not the structure that a save writes."""
    dict(meta["config"])
    for path, (shape, dtype) in dict(meta["leaves"]).items():
        if not isinstance(dtype, str) or not all(isinstance(size, int) for size in shape):
            raise ValueError(f"no shape and dtype of {path}")
    evaluated = evaluation(meta)
    if evaluated is not None and not isinstance(evaluated.loss, (int, float)):
        raise ValueError("eval_loss is no number")


def verify(
    folder: epath.Path, step: int, progress: Callable[[int], None] | None = None
) -> tuple[Manifest, Hashes | None]:
    """Compares all files of a step with its manifest and hashes, and returns both; without hashes, only their sizes.

    Args:
      folder: the folder of all steps.
      step: a committed step.
      progress: called with the number of bytes read since its last call.

    Raises:
      DamagedStep: when a file is missing, extra or changed.
      StepVanished: when the step does not exist, or is deleted by its trainer meanwhile.
      UserError: when it has another format.
    """
    path = step_path(folder, step)
    manifest = read_manifest(folder, step)
    if manifest is None:
        read_meta(folder, step)  # Raises the specific error.
        raise StepVanished(folder, step)
    hashes = read_hashes(folder, step, manifest)
    try:
        wrong = manifests.compare(path, manifest, hashes, progress)
    except FileNotFoundError:
        wrong = [FileProblem(META, manifests.MISSING)]
    if not wrong:
        return manifest, hashes
    if step not in committed_steps(folder):
        raise StepVanished(folder, step)
    if read_manifest(folder, step) != manifest:  # The trainer has set it aside and saved it again.
        return verify(folder, step, progress)
    raise DamagedStep(folder, step, wrong)


def read_manifest(folder: epath.Path, step: int) -> Manifest | None:
    """Reads and checks the manifest of a step; None if there is none; raises `DamagedStep` when it is damaged."""
    path = step_path(folder, step)
    try:
        manifest = manifests.read(path)
        if manifest is None:
            return None
        version, saved_step = (as_int(manifest.header[key], 0, _MAX_INT) for key in ("format_version", "step"))
    except (ValueError, KeyError, TypeError) as error:
        raise DamagedStep(folder, step, [FileProblem(manifests.NAME, first_line(error))]) from error
    _refuse_other_format(path, version)
    if saved_step != step:
        raise DamagedStep(folder, step, [FileProblem(manifests.NAME, f"that of step {saved_step}")])
    return manifest


def read_hashes(folder: epath.Path, step: int, manifest: Manifest) -> Hashes | None:
    """Reads the hashes of a step with this manifest; None if there are none yet; raises `DamagedStep` when damaged."""
    try:
        return manifests.read_hashes(step_path(folder, step), manifest)
    except ValueError as error:
        raise DamagedStep(folder, step, [FileProblem(manifests.HASHES, first_line(error))]) from error


def _refuse_other_format(path: epath.Path, version: int) -> None:
    if version != FORMAT_VERSION:
        raise UserError(
            f"checkpoint {path} has a format that this aimv2_jax does not read",
            f"format {version}, needed is {FORMAT_VERSION}",
            "Update aimv2_jax" if version > FORMAT_VERSION else "Use the aimv2_jax that wrote it, or start a new run",
        )


# --- best step -----------------------------------------------------------------------------------------------------


def evaluation(meta: Mapping[str, Any]) -> Evaluation | None:
    """The held-out loss of a step, or None if it was not evaluated."""
    if meta["eval_loss"] is None:
        return None
    return Evaluation(meta["eval_loss"], json.dumps(measured_on(meta["config"]["eval"]), sort_keys=True))


def measured_on(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The part of config `eval` that a held-out loss depends on: datasets count by name, since they may move."""
    return {**settings, "batch_size": None, "sources": sorted(settings["sources"])}


def best(record: Mapping[int, Evaluation | None]) -> int | None:
    """The step with the lowest loss among those with the conditions of the newest evaluation."""
    evaluated = {step: evaluation for step, evaluation in record.items() if evaluation is not None}
    if not evaluated:
        return None
    conditions = evaluated[max(evaluated)].conditions
    return min((value.loss, step) for step, value in evaluated.items() if value.conditions == conditions)[1]


# --- arrays --------------------------------------------------------------------------------------------------------


def leaves(tree: Any) -> dict[str, list]:
    """Shape and dtype of every array, `{"params/encoder/...": [shape, dtype]}`."""
    return {
        leaf_path(path): [list(leaf.shape), str(leaf.dtype)] for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }


def leaf_path(path: tuple) -> str:
    """A JAX key path as `params/encoder/...`."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def check_leaves(step: int, saved: Mapping[str, list], wanted: Mapping[str, list], partial: bool) -> None:
    """Raises `UserError` with the path of an array that is missing, extra (unless `partial`) or different."""
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


# --- messages ------------------------------------------------------------------------------------------------------


def list_steps(steps: list[int]) -> str:
    """The remedy for a step that does not exist: the steps that do."""
    return f"Existing steps: {', '.join(map(str, steps))}" if steps else "The folder has no steps; give another folder"
