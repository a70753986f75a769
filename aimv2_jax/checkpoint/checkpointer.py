"""Verified checkpoints of the training state and config, one folder a step: `WORKDIR/checkpoints/STEP/`.

A step's folder has three parts: `state` (the arrays, sharded as on the devices), `meta` (a small JSON record: format,
step, config, evaluation, and the path, shape and dtype of every array), and `manifest.json` with `hashes.json` (size
and hash of every other file; see manifest.py). Commit and delete are atomic; see layout.py. A step is committed as soon
as it is written, and hashed afterwards; see hashing.py. Every file is compared with sizes and hashes before any array
of the step is returned. This is the only module that uses Orbax.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import dataclasses
import errno
import itertools
import logging
import math
import re
import sys
import threading
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any, Literal

import jax
import orbax.checkpoint as ocp
from etils import epath
from flax import traverse_util

from aimv2_jax.checkpoint import layout, metadata
from aimv2_jax.checkpoint.error_text import drop_orbax_tracebacks, human_bytes, reason_of
from aimv2_jax.checkpoint.event_loops import DrainingEventLoops
from aimv2_jax.checkpoint.hashing import StepHasher
from aimv2_jax.checkpoint.layout import FOLDER
from aimv2_jax.checkpoint.manifest import FileProblem, Manifest
from aimv2_jax.checkpoint.metadata import FORMAT_VERSION, DamagedStep, Evaluation, StepVanished
from aimv2_jax.checkpoint.save_barrier import PeerFailed, SaveBarrier, SaveFailure
from aimv2_jax.config.load import config_to_dict
from aimv2_jax.config.schema import Config
from aimv2_jax.console import print_line
from aimv2_jax.distributed import coordination
from aimv2_jax.errors import StorageError, UserError
from aimv2_jax.storage.bucket import bucket_errors
from aimv2_jax.storage.files import exists, is_remote, is_temporary, make_folder, with_retries

SaveError = UserError | StorageError
"""Error of a failed save: the user can fix it, or waiting for the bucket may help."""
WeightChoice = Literal["average", "raw"]
"""Parameters to load from a run that kept an average."""

# Orbax and the other processes wait as long as a save or a scan of all steps takes. Orbax measures by the wall clock,
# which may jump by decades; the limit is the run's watchdog, by a monotonic clock (`watch.save_s`, `watch.start_s`).
_NO_LIMIT_S = 1000 * 365 * 86_400
_sync_ids = itertools.count()  # Numbers the broadcasts; all processes make them in the same order.


class CheckpointReader:
    """Reads the checkpoints of a run; writes, sweeps and deletes nothing, so a running trainer is not disturbed.

    No array of a damaged step is returned. In a run of several processes only process 0 compares files; the others
    use the step that it selects.
    """

    def __init__(self, workdir: str | Path):
        self._folder = layout.absolute(workdir) / FOLDER
        self._verified: dict[int, Manifest] = {}

    def steps(self) -> list[int]:
        """All committed steps, in ascending order."""
        return layout.committed_steps(self._folder)

    def set_aside(self) -> list[str]:
        """Names of the folders that damaged and abandoned steps were moved to."""
        return layout.set_aside_names(self._folder)

    def latest_step(self) -> int | None:
        """The newest step, or None."""
        return max(self.steps(), default=None)

    def best_step(self) -> int | None:
        """The step with the lowest held-out loss, or None when no step was evaluated.

        If the evaluation settings changed on a resume, only losses under the newest settings are compared.
        """
        return metadata.best(self._record())

    def meta(self, step: int) -> dict[str, Any]:
        """Metadata of a step: `format_version, step, config, eval_loss, extra, leaves`.

        Raises:
          UserError: when the step does not exist, its metadata is damaged, or it has another format.
        """
        return metadata.read_meta(self._folder, step)

    def verify(self, step: int, progress: Callable[[int], None] | None = None) -> None:
        """Compares every file of a step with its manifest and its hashes; a step without hashes is logged.

        Args:
          step: one of `steps()`.
          progress: called with the number of bytes read since its last call.

        Raises:
          UserError: naming the files that are missing, extra or changed (`DamagedStep`); when the step does not exist,
            or has another format.
        """
        self._verified[step], hashes = metadata.verify(self._folder, step, progress)
        if hashes is None:
            print_line(
                f"the checkpoint of step {step} has no hashes yet, so only names and sizes of its files are verified",
                sys.stderr,
            )

    def restore(self, step: int, abstract_state: Any) -> Any:
        """Restores the state of `step` with the shardings of `abstract_state` (`jax.ShapeDtypeStruct` leaves).

        Raises:
          UserError: when a file is damaged; when an array is missing, extra, or has another shape or dtype.
        """
        return self._restore(step, abstract_state, partial=False)

    def restore_part(self, step: int, abstract_part: Any) -> Any:
        """Restores part of the state, such as `{"params": ...}`; all files are verified, other arrays are dropped.

        Raises:
          UserError: when a file is damaged; when an array of `abstract_part` is missing, or has another shape or dtype.
        """
        return self._restore(step, abstract_part, partial=True)

    def restore_params(
        self, step: int, wanted: Mapping[str, jax.ShapeDtypeStruct], weights: WeightChoice = "average"
    ) -> dict[str, jax.Array]:
        """Restores parameters by path ("encoder/trunk/norm/scale"), trained or frozen; other arrays are dropped.

        Args:
          step: one of `steps()`.
          wanted: shape, dtype and sharding by path.
          weights: "average": averaged parameters where the run kept them; "raw": those of the step.

        Raises:
          UserError: as `restore_part`.
        """
        meta = self.meta(step)
        leaf_of = {path: leaf for leaf, path in param_leaves(meta, weights).items()}
        tree = params_tree(meta, weights)  # An array that is in no tree is reported as missing there.
        leaves = {path: leaf_of.get(path, f"{tree}/{path}") for path in wanted}
        abstract = {leaves[path]: leaf for path, leaf in wanted.items()}
        restored = self.restore_part(step, traverse_util.unflatten_dict(abstract, sep="/"))
        flat = traverse_util.flatten_dict(restored, sep="/")
        return {path: flat[leaf] for path, leaf in leaves.items()}

    def _restore(self, step: int, abstract: Any, partial: bool) -> Any:
        meta = self.meta(step)
        metadata.check_leaves(step, saved=meta["leaves"], wanted=metadata.leaves(abstract), partial=partial)
        if jax.process_index() == 0:
            self._verify_once(step)
        args = ocp.args.PyTreeRestore(
            item=abstract,
            restore_args=ocp.checkpoint_utils.construct_restore_args(abstract),
            partial_restore=partial,
        )
        path = layout.step_path(self._folder, step) / "state"

        def read() -> Any:
            with (
                DrainingEventLoops(),
                ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader,
                jax.transfer_guard("allow"),
            ):
                try:
                    return reader.restore(path, args=args)
                except Exception as error:
                    if type(error) is Exception and error.__cause__ is not None:  # Orbax hides what TensorStore raised.
                        raise error.__cause__ from None
                    raise

        try:
            return with_retries(read, path)
        except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
            if step not in layout.committed_steps(self._folder):
                raise StepVanished(self._folder, step) from error
            # Where the bucket failed, nothing is known of its files. These two mean that TensorStore has read a file.
            was_read = getattr(error.__cause__, "errno", 0) == errno.ENODATA or "DATA_LOSS" in str(error)
            if is_remote(path) and isinstance(error, OSError) and not was_read:
                raise
            # Shapes and dtypes were compared before, so the files are damaged.
            raise DamagedStep(self._folder, step, [FileProblem("state", reason_of(error))]) from error

    def _verify_once(self, step: int) -> None:
        """Verifies a step unless this reader already has and its manifest is unchanged."""
        if step not in self._verified or self._verified[step] != metadata.read_manifest(self._folder, step):
            self.verify(step)

    def _record(self) -> dict[int, Evaluation | None]:
        return _read_record(self._folder)


@dataclasses.dataclass(frozen=True)
class CorruptCheckpoint:
    """A damaged step, the problems with its files, and the folder that it was moved to."""

    step: int
    wrong: tuple[FileProblem, ...]
    moved_to: str

    def __str__(self) -> str:
        return (
            f"the checkpoint of step {self.step} is damaged and was set aside as {FOLDER}/{self.moved_to}: "
            f"{metadata.summarize(self.wrong)}"
        )


class Checkpointer(CheckpointReader):
    """Asynchronous checkpoint writer that keeps the newest, the best and chosen steps; every process creates one.

    A save that failed on any process is reported once on all of them; the next save makes up for it, and the second
    failure in a row is raised. A folder that cannot be deleted fails no save: it is logged once, and the deletion is
    retried before each save.

    Args:
      workdir: the run's folder; half-written steps of a killed run are deleted.
      keep: how many of the newest steps are kept. The best is always kept, too.
      keep_steps: further steps that are kept. All others are deleted.
    """

    def __init__(self, workdir: str | Path, keep: int, keep_steps: Collection[int] = ()):
        super().__init__(workdir)
        logging.getLogger("absl").addFilter(drop_orbax_tracebacks)
        make_folder(self._folder, "--workdir")
        self._keep = keep
        self._keep_steps = frozenset(keep_steps)
        self._pending: concurrent.futures.Future[_Outcome] | None = None
        self._failure: SaveError | None = None  # The error of the newest save, if it failed.
        self._is_reported = False
        self._consecutive_failures = 0
        self._undeleted: dict[str, str] = {}
        if jax.process_index() == 0:
            self._undeleted = dict.fromkeys(layout.half_written(self._folder), "of a killed save")
        self._hasher = StepHasher(self._folder)
        self._sweep()
        self._unreadable: set[int] = set()
        self._evaluations = _read_record(self._folder, self._unreadable)
        self._finisher = concurrent.futures.ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._barrier = SaveBarrier()
        options = ocp.AsyncOptions(
            timeout_secs=_NO_LIMIT_S,
            barrier_sync_fn=self._barrier,
            # In the background, Orbax waits for folders by the wall clock, for minutes if one cannot be created.
            # In the foreground, other processes would wait for it in a collective forever.
            create_directories_asynchronously=jax.process_count() > 1,
        )
        handler = ocp.CompositeCheckpointHandler(composite_options=ocp.CompositeOptions(async_options=options))
        self._orbax = ocp.AsyncCheckpointer(handler, async_options=options)
        self._loops = contextlib.ExitStack()
        self._loops.enter_context(DrainingEventLoops())

    def steps(self) -> list[int]:
        self._settle(block=False)
        return sorted(self._evaluations)

    def newest_intact(self) -> tuple[int | None, list[CorruptCheckpoint]]:
        """The newest verified step (None if the run has no steps) and the damaged steps, which are set aside.

        Call it once at a start, on every process; all return the result of process 0. Steps older than the intact one
        are not read, except those whose metadata is damaged. Steps without hashes are hashed in the background.

        Raises:
          UserError: when there are steps and none is intact; then no step is moved.
        """
        self._settle(block=True)
        result = self._find_intact() if jax.process_index() == 0 else None
        result = coordination.broadcast(f"newest intact checkpoint {next(_sync_ids)}", result, _NO_LIMIT_S)
        wrong = {step: tuple(FileProblem(*pair) for pair in pairs) for step, pairs in result["wrong"]}
        if result["step"] is None and wrong:
            raise UserError(
                f"no checkpoint in {self._folder} is intact",
                "; ".join(f"step {step}: {metadata.summarize(files[:1])}" for step, files in wrong.items()),
                "Restore an intact copy, or give another --workdir to start again; list all damaged files with "
                f"python -m aimv2_jax.checkpoint.verify {self._folder.parent}",
            )
        self._forget(wrong)
        for step in result["unhashed"]:
            self._hasher.add(step, f"hashes of step {step}")
        return result["step"], [CorruptCheckpoint(step, wrong[step], name) for step, name in result["moved"]]

    def set_aside_newer(self, step: int, why: str) -> list[int]:
        """Sets aside all steps newer than `step` and returns them; call it on every process.

        Their files are kept, but they are no steps any more, not even the best or `keep_steps`: they belong to progress
        that the run rolls back, and would otherwise be restored as its newest.

        Args:
          step: the newest step that remains; a save in progress is waited for, and set aside.
          why: a lowercase word, such as "rewound".
        """
        assert re.fullmatch("[a-z]+", why), why
        self._settle(block=True)
        newer = sorted(other for other in self._evaluations if other > step)
        if jax.process_index() == 0:
            for newest in reversed(newer):  # A kill in between leaves a shorter, valid history.
                with self._hasher.lock:
                    layout.set_aside(self._folder, newest, why)
        coordination.broadcast(f"checkpoints set aside {next(_sync_ids)}", True, _NO_LIMIT_S)
        self._forget(newer)
        return newer

    def save(
        self,
        step: int,
        state: Any,
        config: Config | None,
        eval_loss: float | None = None,
        extra: Mapping[str, Any] | None = None,
    ) -> SaveError | None:
        """Starts to save `state` as `step`, after the previous save has ended.

        On return the arrays are copied, so the caller may donate them. They are written in the background.

        Args:
          step: the number of steps that produced `state`; not yet among `steps()`.
          state: a pytree of `jax.Array`.
          config: the run's config, stored in `meta`. None: parameters of unknown origin.
          eval_loss: the held-out loss of this state, or of its parameter average if it has one; a loss that isn't
            finite counts as none.
          extra: further JSON values stored in `meta`.

        Returns:
          A first failure that was not reported yet: of the previous save, which this one makes up for, or of the start
          of this one, which was retried at once. This save is in progress in any case.

        Raises:
          UserError: at the second failure in a row.
          StorageError: if the bucket was the reason, and waiting may help.
        """
        self._settle(block=True)
        failed = self._take_failure()
        assert step not in self._evaluations, f"step {step} is saved already"
        meta = {
            "format_version": FORMAT_VERSION,
            "step": step,
            "config": {} if config is None else config_to_dict(config),
            "eval_loss": float(eval_loss) if eval_loss is not None and math.isfinite(eval_loss) else None,
            "extra": dict(extra or {}),
            "leaves": metadata.leaves(state),
        }
        num_bytes = state_bytes(state)
        while (name := self._start(step, state, meta, num_bytes)) is None:
            failed = self._take_failure()
        self._pending = self._finisher.submit(self._finish, step, name, num_bytes, meta)
        return failed

    def check_errors(self) -> SaveError | None:
        """Returns the error of a save that failed in the background, once; cheap enough to be called every step.

        In a run of one process the caller then saves its current state, since no other save makes up for the step that
        was not written. Several processes learn of the failure at different steps but must save the same step: there,
        the next scheduled save makes up for it.

        Raises:
          UserError: at the second failure in a row.
          StorageError: as `save`.
        """
        self._settle(block=False)
        return self._take_failure()

    def wait(self) -> None:
        """Waits until the save in progress is complete and steps that need not be kept are deleted.

        Raises:
          UserError: when the newest save could not be written, even if that was reported before: no other save made up
            for it. Earlier steps are not affected.
          StorageError: as `save`.
        """
        self._settle(block=True)
        self._raise_failure()

    def settle(self) -> None:
        """Waits until no save is in progress; if it failed, `check_errors` reports that."""
        self._settle(block=True)

    def restore(self, step: int, abstract_state: Any) -> Any:
        self.settle()
        return super().restore(step, abstract_state)

    def restore_part(self, step: int, abstract_part: Any) -> Any:
        self.settle()
        return super().restore_part(step, abstract_part)

    def stop_hashing(self) -> None:
        """Leaves what is not hashed yet to the next start of the run, so that `close` does not wait for it."""
        self._hasher.stop()

    def close(self) -> None:
        """Waits for the save in progress and for hashes, and ends the background threads; raises what `wait` raises."""
        try:
            self.wait()
        except BaseException:
            self.stop_hashing()
            raise
        finally:
            self._finisher.shutdown()
            self._hasher.close()
            self._sweep()
            self._orbax.close()
            self._loops.close()

    def __enter__(self) -> Checkpointer:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _record(self) -> dict[int, Evaluation | None]:
        self._settle(block=False)
        return self._evaluations

    def _find_intact(self) -> dict[str, Any]:
        """The result of `newest_intact` as JSON, on process 0; sets damaged steps aside if any step is intact."""
        newest, wrong = None, {}
        for step in sorted(self._evaluations, reverse=True):
            if newest is not None and step not in self._unreadable:
                continue
            try:
                self.verify(step)
                newest = step
            except DamagedStep as error:
                wrong[step] = error.wrong
        moved = [] if newest is None else [(step, layout.set_aside(self._folder, step, "damaged")) for step in wrong]
        files = [(step, [dataclasses.astuple(file) for file in files]) for step, files in wrong.items()]
        unhashed = [] if newest is None else layout.unhashed_steps(self._folder)
        return {"step": newest, "wrong": files, "moved": moved, "unhashed": unhashed}

    def _forget(self, steps: Collection[int]) -> None:
        self._unreadable -= set(steps)
        self._evaluations = {step: value for step, value in self._evaluations.items() if step not in steps}

    def _start(self, step: int, state: Any, meta: Mapping[str, Any], num_bytes: int) -> str | None:
        """Starts a save with Orbax and returns the name of its folder; on failure records the error and returns None.

        Process 0 tries the disk first, so that either all processes start the save or none does.
        """
        sync_id = next(_sync_ids)
        target = self._reserve_folder(step) if jax.process_index() == 0 else None
        target = coordination.broadcast(f"begin of checkpoint {sync_id}", target, _NO_LIMIT_S)
        if target["failure"] is not None:
            self._fail(self._save_error(step, num_bytes, SaveFailure(**target["failure"])))
            return None
        self._barrier.begin(f"checkpoint {sync_id}")
        try:
            with jax.transfer_guard("allow"), bucket_errors(self._folder):
                self._orbax.save(
                    self._folder / target["name"],
                    args=ocp.args.Composite(state=ocp.args.StandardSave(state), meta=ocp.args.JsonSave(meta)),
                    force=True,  # Replaces leftovers of a killed save in a bucket; never a committed step.
                )
        except OSError as error:
            if jax.process_count() > 1:  # Other processes may be in a collective of this save.
                raise
            self._fail(self._save_error(step, num_bytes, _failure(error)))
            return None
        return target["name"]

    def _reserve_folder(self, step: int) -> dict[str, Any]:
        """The folder name for a new save, or the reason why it cannot start; on process 0."""
        self._sweep()  # Leftovers of a failed save would take the space of this one.
        try:
            return {"name": layout.reserve_folder(self._folder, step), "failure": None}
        except OSError as error:
            return {"name": None, "failure": dataclasses.asdict(_failure(error))}

    def _finish(self, step: int, name: str, num_bytes: int, meta: Mapping[str, Any]) -> _Outcome:
        """Completes and commits a save, then deletes steps that need not be kept; runs in the background."""
        self._barrier.forget_before()
        failure = self._write(step, name, meta)
        # All processes agree on whether the step was committed.
        failure = None if failure is None else dataclasses.asdict(failure)
        failure = coordination.broadcast(f"end of {self._barrier.save}", failure, _NO_LIMIT_S)
        if failure is not None:
            return _Outcome(self._evaluations, self._save_error(step, num_bytes, SaveFailure(**failure)))
        self._hasher.add(step, f"hashes of {self._barrier.save}")
        record = {**self._evaluations, step: metadata.evaluation(meta)}
        kept = {*sorted(record)[-self._keep :], metadata.best(record), *self._keep_steps, *self._unreadable}
        remaining = {step: value for step, value in record.items() if step in kept}
        if jax.process_index() == 0:
            for old_step in record.keys() - kept:
                with self._hasher.lock:
                    undeleted = layout.delete(self._folder, old_step)
                self._warn_undeleted(undeleted)
                if undeleted and old_step in layout.committed_steps(self._folder):
                    remaining[old_step] = record[old_step]
        return _Outcome(remaining, None)

    def _write(self, step: int, name: str, meta: Mapping[str, Any]) -> SaveFailure | None:
        """Waits until no process writes any more, then commits the step; returns the reason of a failure."""
        failure = None
        try:
            with bucket_errors(self._folder):
                self._orbax.wait_until_finished()
        except PeerFailed as error:
            failure = error.failure
        # TensorStore raises ValueError for a full disk; Orbax raises JaxRuntimeError if process 0 cannot make folders.
        except (OSError, ValueError, jax.errors.JaxRuntimeError) as error:
            failure = self._barrier.fail(_failure(error))
            _wait_for_writers()
        if jax.process_count() > 1:
            self._barrier.end()
        if failure is None and jax.process_index() == 0:
            try:
                layout.commit(self._folder, name, step, metadata.manifest_header(meta))
            except (OSError, ValueError) as error:
                failure = self._barrier.fail(_failure(error))
        return failure

    def _sweep(self) -> None:
        """Deletes leftovers of failed saves and deletions, as far as possible."""
        try:
            with self._hasher.lock:
                undeleted = layout.sweep(self._folder, self._undeleted)
            self._undeleted = {name: why for name, why in self._undeleted.items() if exists(self._folder / name)}
        except OSError:  # The folder is unreadable or gone; the next save reports it.
            return
        self._warn_undeleted(undeleted)

    def _warn_undeleted(self, undeleted: Mapping[str, str]) -> None:
        """Logs each folder that cannot be deleted, once; the run goes on."""
        new = undeleted.keys() - self._undeleted.keys()
        self._undeleted |= undeleted
        for name in sorted(new):
            print_line(
                f"could not delete {self._folder / name} ({undeleted[name]}); the deletion is retried before each save "
                f"({len(self._undeleted)} in all)",
                sys.stderr,
            )

    def _settle(self, block: bool) -> None:
        """Records the outcome of the save in progress if it has ended; with `block`, waits for its end."""
        if self._pending is None or not (block or self._pending.done()):
            return
        pending, self._pending = self._pending, None
        outcome = pending.result()
        self._evaluations = outcome.evaluations
        if outcome.failure is None:
            self._failure = None
            self._consecutive_failures = 0
        else:
            self._fail(outcome.failure)

    def _fail(self, failure: SaveError) -> None:
        self._failure = failure
        self._is_reported = False
        self._consecutive_failures += 1

    def _take_failure(self) -> SaveError | None:
        """The failure that was not reported yet, if any; raises the second in a row."""
        if self._failure is None or self._is_reported:
            return None
        if self._consecutive_failures > 1:
            self._raise_failure()
        self._is_reported = True
        return self._failure

    def _raise_failure(self) -> None:
        if self._failure is not None:
            failure, self._failure = self._failure, None
            raise failure

    def _save_error(self, step: int, num_bytes: int, failure: SaveFailure) -> SaveError:
        try:
            free = layout.free_bytes(self._folder)
        except OSError:  # The disk is gone.
            free = None
        room = "" if free is None else f" ({human_bytes(free)} free)"
        last = max((other for other in self._evaluations if other != step), default=None)
        good = "no checkpoint was written before" if last is None else f"the last good one, step {last}, is untouched"
        what = f"could not write the checkpoint of step {step}, which needs {human_bytes(num_bytes)}{room}"
        if failure.is_temporary:
            return StorageError(f"{what}: {failure.reason}; {good}")
        return UserError(
            what,
            failure.reason,
            f"Make room in {self._folder} or fix the error above, and start the same command again; {good}",
        )


@dataclasses.dataclass(frozen=True)
class _Outcome:
    """Result of a save: the committed steps with their evaluations, and the error if it failed."""

    evaluations: dict[int, Evaluation | None]
    failure: SaveError | None


def _failure(error: Exception) -> SaveFailure:
    return SaveFailure(reason_of(error), is_temporary(error))


def _wait_for_writers() -> None:
    """Waits for Orbax's threads: Orbax raises the first write error while other threads still write to the folder."""
    for thread in threading.enumerate():
        if type(thread).__module__.startswith("orbax."):
            threading.Thread.join(thread)  # Orbax overrides `join` to raise the thread's error.


def _read_record(folder: epath.Path, unreadable: set[int] | None = None) -> dict[int, Evaluation | None]:
    """The evaluation of every step; steps with damaged metadata are added to `unreadable`, or raised if it is None."""
    record = {}
    for step in layout.committed_steps(folder):
        try:
            record[step] = metadata.evaluation(metadata.read_meta(folder, step))
        except StepVanished:  # A running trainer has deleted it since.
            continue
        except DamagedStep:
            if unreadable is None:
                raise
            unreadable.add(step)
            record[step] = None
    return record


def params_tree(meta: Mapping[str, Any], weights: WeightChoice = "average") -> str:
    """Name of the tree with the parameters to use of the state that `meta` describes: "ema_params" or "params".

    By default it is the tree that the run's evaluations measured: the average, if the run kept one.
    """
    has_average = any(leaf.startswith("ema_params/") for leaf in meta["leaves"])
    return "ema_params" if weights == "average" and has_average else "params"


def param_leaves(meta: Mapping[str, Any], weights: WeightChoice = "average") -> dict[str, str]:
    """Paths of all parameters by the name of their leaf in the state that `meta` describes.

    `{"params/encoder/…": "encoder/…"}`; trained parameters are in the tree that `params_tree` names, the others in
    "frozen".
    """
    prefixes = (f"{params_tree(meta, weights)}/", "frozen/")
    return {leaf: leaf.partition("/")[2] for leaf in meta["leaves"] if leaf.startswith(prefixes)}


def parse_spec(spec: str | Path, key: str = "--checkpoint") -> tuple[str, int]:
    """Parses a `--checkpoint` value as `(workdir, step)`; `key` is the flag or config key that gave it.

    `WORKDIR` means its best step, or its latest if no step was evaluated; `WORKDIR:last` its latest; `WORKDIR:STEP`
    that step. An existing folder whose own name has a colon is taken literally.

    Raises:
      UserError: when the folder does not exist, has no checkpoint, or lacks that step.
    """
    workdir, which = _split_spec(str(spec))
    if which != "best" and exists(layout.absolute(spec) / FOLDER):
        workdir, which = str(spec), "best"
    if not workdir or not exists(layout.absolute(workdir)):
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
        raise UserError(f"{key}: the run has no such step", int(which), metadata.list_steps(steps))
    return workdir, int(which)


def _split_spec(spec: str) -> tuple[str, str]:
    workdir, _, which = spec.rpartition(":")
    if workdir and re.fullmatch("last|[0-9]{1,18}", which):
        return workdir, which
    return spec, "best"


def state_bytes(abstract_state: Any) -> int:
    """Bytes of all arrays of the state, summed over all devices."""
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(abstract_state))


def check_free_space(workdir: str | Path, state_bytes: int) -> None:
    """Raises `UserError` unless two checkpoints fit: the last good one, and the one being written."""
    free = layout.free_bytes(layout.absolute(workdir))
    if free is not None and free < 2 * state_bytes:
        raise UserError(
            f"--workdir {workdir}: too little disk space for two checkpoints of {human_bytes(state_bytes)}",
            f"{human_bytes(free)} free, {human_bytes(2 * state_bytes)} needed",
            "Make room there, or give a --workdir on another disk",
        )
