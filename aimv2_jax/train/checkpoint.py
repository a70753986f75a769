"""Checkpoints: the whole state and the run's config, once a step, in `WORKDIR/checkpoints/STEP/`.

A step's folder has two parts: `state` (the arrays, sharded as they lie on the devices) and `meta` (a small JSON record:
format, step, config, evaluation, and the path, shape and dtype of every array). It comes into being by one rename when
all of it is written, and stops being one by a rename before anything of it is deleted: a folder whose name is a number
is a whole checkpoint. The only module that knows Orbax.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import dataclasses
import json
import logging
import math
import os
import re
import shutil
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from etils import epath

from aimv2_jax.config import Config, config_to_dict
from aimv2_jax.errors import UserError

FORMAT_VERSION = 1

_FOLDER = "checkpoints"
_TEMPORARY = ocp.utils.TMP_DIR_SUFFIX
_COMMIT_FILE = "commit_success.txt"  # Orbax writes it last; where a rename isn't atomic (gs://) it alone counts.


@dataclasses.dataclass(frozen=True)
class _Evaluation:
    """A held-out loss, and what it was measured on: only losses on the same can be compared."""

    loss: float
    conditions: str


class CheckpointReader:
    """Reads the checkpoints of a run; writes, sweeps and deletes nothing, so a running trainer is not disturbed."""

    def __init__(self, workdir: str | Path):
        self._folder = _absolute(workdir) / _FOLDER

    def steps(self) -> list[int]:
        """The steps that were saved to their end, in rising order."""
        return _committed_steps(self._folder)

    def latest_step(self) -> int | None:
        """The newest step, or None."""
        return max(self.steps(), default=None)

    def best_step(self) -> int | None:
        """The step with the lowest held-out loss, or None when none was evaluated.

        Where the evaluation's own settings were changed on a resume, only the losses under the newest are compared.
        """
        return _best(self._record())

    def meta(self, step: int) -> dict[str, Any]:
        """What was written beside the state: `format_version, step, config, eval_loss, extra, leaves`.

        Raises:
          UserError: when the step isn't there, its record is damaged, or a newer version wrote it.
        """
        return _read_meta(self._folder, step)

    def restore(self, step: int, abstract_state: Any) -> Any:
        """The state of `step`, placed as the shardings of `abstract_state` (`jax.ShapeDtypeStruct` leaves) say.

        Raises:
          UserError: when an array is missing, extra, or has another shape or dtype.
        """
        return self._restore(step, abstract_state, partial=False)

    def restore_part(self, step: int, abstract_part: Any) -> Any:
        """Part of the state, such as `{"params": ...}`; arrays that are not asked for are not read.

        Raises:
          UserError: when an array of `abstract_part` is missing, or has another shape or dtype.
        """
        return self._restore(step, abstract_part, partial=True)

    def _restore(self, step: int, abstract: Any, partial: bool) -> Any:
        _check_leaves(step, saved=self.meta(step)["leaves"], wanted=_leaves(abstract), partial=partial)
        args = ocp.args.PyTreeRestore(
            item=abstract,
            restore_args=ocp.checkpoint_utils.construct_restore_args(abstract),
            partial_restore=partial,
        )
        path = self._folder / str(step) / "state"
        try:
            with (
                _reads_seen_through(),
                ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader,
                jax.transfer_guard("allow"),
            ):
                return reader.restore(path, args=args)
        except (
            OSError,
            ValueError,
            KeyError,
            TypeError,
        ) as error:  # Shapes and types were compared before: it's the files.
            raise _damaged(path, error) from error

    def _record(self) -> dict[int, _Evaluation | None]:
        return _read_record(self._folder)


class Checkpointer(CheckpointReader):
    """Saves a run's state without stopping it, and keeps the newest, the best and some more; every process makes one.

    Args:
      workdir: the run's folder; half-written steps that a killed run left in it are swept away.
      keep: how many of the newest steps are kept. The best is kept beside them.
      keep_steps: steps that are kept, too. All others are deleted.
    """

    def __init__(self, workdir: str | Path, keep: int, keep_steps: Collection[int] = ()):
        super().__init__(workdir)
        logging.getLogger("absl").addFilter(_is_news)
        self._keep, self._keep_steps = keep, frozenset(keep_steps)
        self._pending: concurrent.futures.Future[dict[int, _Evaluation | None]] | None = None
        _make_folder(self._folder)
        _sweep(self._folder)
        self._known = _read_record(self._folder)
        self._finisher = concurrent.futures.ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        # When folders are made in the background and one cannot be, Orbax's other threads wait for it for minutes.
        options = ocp.AsyncOptions(create_directories_asynchronously=False)
        self._orbax = ocp.AsyncCheckpointer(ocp.CompositeCheckpointHandler(), async_options=options)

    def steps(self) -> list[int]:
        self.check_errors()
        return sorted(self._known)

    def save(
        self,
        step: int,
        state: Any,
        config: Config | None,
        eval_loss: float | None = None,
        extra: Mapping[str, Any] | None = None,
    ) -> None:
        """Starts to save `state` as `step`, after the save before has ended.

        On return the arrays are copied: the caller may donate them. They are written in the background.

        Args:
          step: the number of steps that made `state`; not yet among `steps()`.
          state: a pytree of `jax.Array`.
          config: the run's; goes into `meta`. None: parameters of unknown making.
          eval_loss: the held-out loss of this very state, of its average where it has one; a loss that isn't finite
            counts as none.
          extra: whatever else shall stand in `meta`, as JSON.

        Raises:
          UserError: when the save before, or the start of this one, could not be written.
        """
        self.wait()
        assert step not in self._known, f"step {step} is saved already"
        meta = {
            "format_version": FORMAT_VERSION,
            "step": step,
            "config": {} if config is None else config_to_dict(config),
            "eval_loss": float(eval_loss) if eval_loss is not None and math.isfinite(eval_loss) else None,
            "extra": dict(extra or {}),
            "leaves": _leaves(state),
        }
        num_bytes = state_bytes(state)
        try:
            _sweep(self._folder)  # What a failed save left would take the room of this one.
            with jax.transfer_guard("allow"):
                self._orbax.save(
                    self._folder / str(step),
                    args=ocp.args.Composite(state=ocp.args.StandardSave(state), meta=ocp.args.JsonSave(meta)),
                    force=True,  # Replaces what a killed save left where nothing is renamed; never a whole step.
                )
        except OSError as error:
            raise self._not_written(step, num_bytes, error) from error
        record = {**self._known, step: _evaluation(meta)}
        self._pending = self._finisher.submit(self._finish, step, num_bytes, record)

    def check_errors(self) -> None:
        """Raises the error of a save that failed in the background; costs nothing, to be called every step."""
        if self._pending is not None and self._pending.done():
            self.wait()

    def wait(self) -> None:
        """Returns when the save in progress is complete, and steps that need not be kept are gone.

        Raises:
          UserError: when it could not be written; the steps that were there before still are.
        """
        pending, self._pending = self._pending, None
        if pending is not None:
            self._known = pending.result()

    def restore(self, step: int, abstract_state: Any) -> Any:
        self.wait()
        return super().restore(step, abstract_state)

    def restore_part(self, step: int, abstract_part: Any) -> Any:
        self.wait()
        return super().restore_part(step, abstract_part)

    def close(self) -> None:
        """Waits for the save in progress, and ends the background threads; raises what `wait` raises."""
        try:
            self.wait()
        finally:
            self._finisher.shutdown()
            _sweep(self._folder)
            self._orbax.close()

    def __enter__(self) -> Checkpointer:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _record(self) -> dict[int, _Evaluation | None]:
        self.check_errors()
        return self._known

    def _finish(
        self, step: int, num_bytes: int, record: dict[int, _Evaluation | None]
    ) -> dict[int, _Evaluation | None]:
        """In the background: sees the save of `step` through, deletes what need not be kept, returns what is left."""
        try:
            self._orbax.wait_until_finished()
        except (OSError, ValueError, TimeoutError) as error:  # TensorStore tells of a full disk by ValueError.
            raise self._not_written(step, num_bytes, error) from error
        kept = {*sorted(record)[-self._keep :], _best(record), *self._keep_steps}
        for old in record.keys() - kept:
            _delete(self._folder, old)
        return {step: record[step] for step in sorted(record.keys() & kept)}

    def _not_written(self, step: int, num_bytes: int, error: Exception) -> UserError:
        free = _free_bytes(self._folder)
        room = "" if free is None else f" ({_human(free)} free)"
        last = max((known for known in self._known if known != step), default=None)
        good = "no checkpoint was written before" if last is None else f"the last good one, step {last}, is untouched"
        return UserError(
            f"could not write the checkpoint of step {step}, which needs {_human(num_bytes)}{room}",
            _reason(error),
            f"Make room in {self._folder} or mend what is said above, and start the same command again; {good}",
        )


class _StepVanished(UserError):
    """The step isn't there."""


def has_average(meta: Mapping[str, Any]) -> bool:
    """Whether the state of this `meta` has an average of the parameters, beside those of the step."""
    return any(leaf.startswith("average/") for leaf in meta["leaves"])


def parse_spec(spec: str | Path, key: str = "--checkpoint") -> tuple[str, int]:
    """Reads what `--checkpoint` takes as `(workdir, step)`; `key` is what it is called where it was given.

    `WORKDIR` is its best step, or its latest when none was evaluated; `WORKDIR:last` its latest; `WORKDIR:STEP` that
    one. A folder whose own name has a colon is taken as such when it is there.

    Raises:
      UserError: when there is no such folder, no checkpoint in it, or not that step.
    """
    workdir, which = _split_spec(str(spec))
    if which != "best" and (_absolute(spec) / _FOLDER).is_dir():
        workdir, which = str(spec), "best"
    if not workdir or not _absolute(workdir).is_dir():
        raise UserError(f"{key}: no such folder", workdir, "Give WORKDIR, WORKDIR:STEP or WORKDIR:last")
    reader = CheckpointReader(workdir)
    steps = reader.steps()
    if not steps:
        raise UserError(f"{key}: the folder has no checkpoints", workdir, "Give the --workdir of a training run")
    if which == "last":
        return workdir, steps[-1]
    if which == "best":
        best = reader.best_step()
        return workdir, steps[-1] if best is None else best
    if int(which) not in steps:
        raise UserError(f"{key}: the run has no such step", int(which), _there(steps))
    return workdir, int(which)


def _split_spec(spec: str) -> tuple[str, str]:
    workdir, _, which = spec.rpartition(":")
    if workdir and re.fullmatch("last|[0-9]{1,18}", which):
        return workdir, which
    return spec, "best"


def state_bytes(abstract_state: Any) -> int:
    """Bytes of all arrays of the state, over all devices."""
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(abstract_state))


def check_free_space(workdir: str | Path, state_bytes: int) -> None:
    """Raises `UserError` when two checkpoints don't fit: the last good one, and one in the making."""
    free = _free_bytes(_absolute(workdir))
    if free is not None and free < 2 * state_bytes:
        raise UserError(
            f"--workdir {workdir}: too little room for two checkpoints of {_human(state_bytes)}",
            f"{_human(free)} free, {_human(2 * state_bytes)} needed",
            "Make room there, or give a --workdir on another disk",
        )


# --- the record ----------------------------------------------------------------------------------------------------


def _read_meta(folder: epath.Path, step: int) -> dict[str, Any]:
    path = folder / str(step) / "meta" / "metadata"
    try:
        meta = json.loads(path.read_text())
        version = int(meta["format_version"])
        if version <= FORMAT_VERSION:
            dict(meta["config"]), dict(meta["leaves"]), _evaluation(meta)
    except (FileNotFoundError, NotADirectoryError) as error:
        steps = _committed_steps(folder)
        if step in steps:
            raise _damaged(path, error) from error
        raise _StepVanished(f"no checkpoint of this step in {folder}", step, _there(steps)) from error
    except (ValueError, KeyError, TypeError) as error:
        raise _damaged(path, error) from error
    if version > FORMAT_VERSION:
        raise UserError(
            f"checkpoint {folder / str(step)} was written by a newer aimv2_jax",
            f"format {version}, this one reads up to {FORMAT_VERSION}",
            "Update aimv2_jax",
        )
    return meta


def _read_record(folder: epath.Path) -> dict[int, _Evaluation | None]:
    """What is known of every step of the run."""
    record = {}
    for step in _committed_steps(folder):
        try:
            record[step] = _evaluation(_read_meta(folder, step))
        except _StepVanished:  # A running trainer deleted it since: no longer one of the run's checkpoints.
            continue
    return record


def _damaged(path: epath.Path, error: Exception) -> UserError:
    return UserError(f"damaged checkpoint: {path}", _reason(error), "Move the step's folder away to use another")


def _evaluation(meta: Mapping[str, Any]) -> _Evaluation | None:
    if meta["eval_loss"] is None:
        return None
    return _Evaluation(meta["eval_loss"], json.dumps(measured_on(meta["config"]["eval"]), sort_keys=True))


def measured_on(settings: Mapping[str, Any]) -> dict[str, Any]:
    """What of config `eval`, as a plain dict, a held-out loss depends on: a set may move, its name tells what it is."""
    return {**settings, "batch_size": None, "sources": sorted(settings["sources"])}


def _best(record: Mapping[int, _Evaluation | None]) -> int | None:
    evaluated = {step: evaluation for step, evaluation in record.items() if evaluation is not None}
    if not evaluated:
        return None
    conditions = evaluated[max(evaluated)].conditions
    return min((value.loss, step) for step, value in evaluated.items() if value.conditions == conditions)[1]


def _leaves(tree: Any) -> dict[str, list]:
    """`{"params/encoder/...": [shape, dtype]}` of every array."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): [list(leaf.shape), str(leaf.dtype)]
        for path, leaf in leaves
    }


def _check_leaves(step: int, saved: Mapping[str, list], wanted: Mapping[str, list], partial: bool) -> None:
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


# --- the folder ----------------------------------------------------------------------------------------------------


def _committed_steps(folder: epath.Path) -> list[int]:
    if not folder.is_dir():
        return []
    steps = sorted(int(path.name) for path in folder.iterdir() if re.fullmatch("0|[1-9][0-9]*", path.name))
    if _renames(folder):
        return steps
    return [step for step in steps if (folder / str(step) / _COMMIT_FILE).exists()]


def _absolute(workdir: str | Path) -> epath.Path:
    """The path from the root, which Orbax wants; a bucket's is that anyway."""
    if "://" not in str(workdir):
        return epath.Path(os.path.abspath(workdir))
    try:
        return epath.Path(workdir)
    except KeyError as error:
        raise UserError("no such kind of storage", str(workdir), "Give a folder, or gs://BUCKET/FOLDER") from error


def _renames(folder: epath.Path) -> bool:
    return "://" not in str(folder)


def _make_folder(folder: epath.Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError("--workdir cannot be made", _first_line(error), "Give a folder that can be written") from error


def _sweep(folder: epath.Path) -> None:
    """Deletes half-written and half-deleted steps; nothing that could be anybody else's."""
    if jax.process_index() == 0 and folder.is_dir():
        for path in folder.iterdir():
            if path.name.partition(_TEMPORARY)[0].isdecimal() and _TEMPORARY in path.name:
                path.rmtree(missing_ok=True)


def _delete(folder: epath.Path, step: int) -> None:
    """Deletes a step so that it is at no moment a step with something missing."""
    if jax.process_index() != 0:
        return
    path = folder / str(step)
    if _renames(folder):
        path = path.rename(folder / f"{step}{_TEMPORARY}-deleted")
    else:
        (path / _COMMIT_FILE).unlink()
    path.rmtree()


def _free_bytes(path: epath.Path) -> int | None:
    """Room on the disk of `path` or of the nearest folder above that exists; None where there is no such limit."""
    if not _renames(path):
        return None
    local = Path(path).absolute()
    return shutil.disk_usage(next(place for place in (local, *local.parents) if place.exists())).free


# --- reading -------------------------------------------------------------------------------------------------------


class _PatientLoop(asyncio.SelectorEventLoop):
    """An event loop that closes when all its tasks have ended."""

    def close(self) -> None:
        if not self.is_closed() and (tasks := asyncio.all_tasks(self)):
            self.run_until_complete(asyncio.gather(*tasks, return_exceptions=True))
        super().close()


class _PatientLoops(asyncio.DefaultEventLoopPolicy):
    def new_event_loop(self) -> asyncio.AbstractEventLoop:
        return _PatientLoop()


@contextlib.contextmanager
def _reads_seen_through() -> Iterator[None]:
    """While this lasts, event loops of this process wait for all their tasks before they close. Not for two threads.

    Orbax closes its loop at the first read that fails; each read still on its way would then end in a traceback of its
    own, beside the one line that tells the user.
    """
    policy = asyncio.get_event_loop_policy()
    asyncio.set_event_loop_policy(_PatientLoops())
    try:
        yield
    finally:
        asyncio.set_event_loop_policy(policy)


# --- words ---------------------------------------------------------------------------------------------------------


def _is_news(record: logging.LogRecord) -> bool:
    """False for the tracebacks that Orbax's threads log of an error which then reaches us, and is raised, anyway."""
    return not (record.exc_info and f"{os.sep}orbax{os.sep}" in record.pathname)


def _there(steps: list[int]) -> str:
    return f"Steps that are there: {', '.join(map(str, steps))}" if steps else "There is none; give another folder"


def _human(num_bytes: float) -> str:
    for unit in ("bytes", "KiB", "MiB", "GiB"):
        if num_bytes < 1024:
            return f"{num_bytes:.0f} {unit}" if unit == "bytes" else f"{num_bytes:.1f} {unit}"
        num_bytes /= 1024
    return f"{num_bytes:.1f} TiB"


def _reason(error: Exception) -> str:
    """Why a write failed: TensorStore's half a screen of nested messages ends in the operating system's number."""
    code = re.search(r"os_error_code='(\d+)'", str(error))
    return os.strerror(int(code[1])) if code else _first_line(error)


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)
