"""Checkpoints: the whole state and the run's config, once a step, in `WORKDIR/checkpoints/STEP/`.

A step's folder has three parts: `state` (the arrays, sharded as they lie on the devices), `meta` (a small JSON record:
format, step, config, evaluation, and the path, shape and dtype of every array), and `manifest.json` (size and hash of
every other file, manifest.py). How it comes into being at one stroke, and ends so, is told in step_folders.py. Every
file is compared with the manifest before an array of the step is given out. The only module that knows Orbax.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import dataclasses
import itertools
import logging
import math
import re
import sys
import threading
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath

from aimv2_jax.config import Config, config_to_dict
from aimv2_jax.console import print_line
from aimv2_jax.errors import UserError
from aimv2_jax.files import make_folder
from aimv2_jax.parallel import processes
from aimv2_jax.train import step_folders, step_meta
from aimv2_jax.train.event_loops import PatientEventLoops
from aimv2_jax.train.manifest import Manifest, Wrong
from aimv2_jax.train.save_barrier import PeerFailed, SaveBarrier
from aimv2_jax.train.step_folders import FOLDER
from aimv2_jax.train.step_meta import FORMAT_VERSION, DamagedStep, Evaluation, StepVanished
from aimv2_jax.train.step_meta import measured_on as measured_on
from aimv2_jax.train.words import human_bytes, is_news, reason_of

_FILLED = "guard/"  # Leaves that format 1 lacks: they start as zeros.
# Orbax and the other processes wait as long as a save or a look at all steps takes: Orbax measures by the wall clock,
# which may jump by decades, and the run's watchdog by a monotonic one (`watch.save_s`, `watch.start_s`).
_NO_LIMIT_S = 1000 * 365 * 86_400
_turns = itertools.count()  # Of what processes agree on here: all of them do it in the same order.


class CheckpointReader:
    """Reads the checkpoints of a run; writes, sweeps and deletes nothing, so a running trainer is not disturbed.

    Nothing of a damaged step is given out. In a run of several processes the first alone compares files; the others
    take its word, since they use the step that it names.
    """

    def __init__(self, workdir: str | Path):
        self._folder = step_folders.absolute(workdir) / FOLDER
        self._verified: dict[int, Manifest | None] = {}
        self._told_unverified: set[int] = set()

    def steps(self) -> list[int]:
        """The steps that were saved to their end, in rising order."""
        return step_folders.committed_steps(self._folder)

    def set_aside(self) -> list[str]:
        """The folders beside the steps that damaged and abandoned steps were moved to."""
        return step_folders.set_aside_names(self._folder)

    def latest_step(self) -> int | None:
        """The newest step, or None."""
        return max(self.steps(), default=None)

    def best_step(self) -> int | None:
        """The step with the lowest held-out loss, or None when none was evaluated.

        Where the evaluation's own settings were changed on a resume, only the losses under the newest are compared.
        """
        return step_meta.best(self._record())

    def meta(self, step: int) -> dict[str, Any]:
        """What was written beside the state: `format_version, step, config, eval_loss, extra, leaves`.

        Raises:
          UserError: when the step isn't there, its record is damaged, or a newer version wrote it.
        """
        return step_meta.read_meta(self._folder, step)

    def verify(self, step: int, progress: Callable[[int], None] | None = None) -> bool:
        """Compares every file of a step with its manifest; False for a step of format 1, which has none.

        Args:
          step: one of `steps()`.
          progress: is told the number of bytes that were read since it was told before.

        Raises:
          UserError: naming the files that are missing, extra or not what was saved (`DamagedStep`); when the step isn't
            there, or a newer version wrote it.
        """
        self._verified[step] = step_meta.verify(self._folder, step, progress)
        return self._verified[step] is not None

    def restore(self, step: int, abstract_state: Any) -> Any:
        """The state of `step`, placed as the shardings of `abstract_state` (`jax.ShapeDtypeStruct` leaves) say.

        A step of format 1 is restored unverified, and says so; what it lacks below `guard/` is zeros.

        Raises:
          UserError: when a file is damaged; when an array is missing, extra, or has another shape or dtype.
        """
        return self._restore(step, abstract_state, partial=False)

    def restore_part(self, step: int, abstract_part: Any) -> Any:
        """Part of the state, such as `{"params": ...}`; all files are compared, arrays not asked for are not kept.

        Raises:
          UserError: when a file is damaged; when an array of `abstract_part` is missing, or has another shape or dtype.
        """
        return self._restore(step, abstract_part, partial=True)

    def _restore(self, step: int, abstract: Any, partial: bool) -> Any:
        meta = self.meta(step)
        fresh = _fresh_leaves(abstract, meta)
        wanted = {path: leaf for path, leaf in step_meta.leaves(abstract).items() if path not in fresh}
        step_meta.check_leaves(step, saved=meta["leaves"], wanted=wanted, partial=partial)
        if jax.process_index() == 0:
            self._verify_once(step)
        asked = _map_paths(lambda path, leaf: ocp.PLACEHOLDER if path in fresh else leaf, abstract)
        args = ocp.args.PyTreeRestore(
            item=asked,
            restore_args=ocp.checkpoint_utils.construct_restore_args(abstract),
            partial_restore=partial or bool(fresh),
        )
        path = step_folders.place(self._folder, step) / "state"
        try:
            with (
                PatientEventLoops(),
                ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader,
                jax.transfer_guard("allow"),
            ):
                restored = reader.restore(path, args=args)
                return _map_paths(lambda path, leaf: _zeros(fresh[path]) if path in fresh else leaf, restored)
        except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
            if step not in step_folders.committed_steps(self._folder):
                raise StepVanished(self._folder, step) from error
            # Shapes and types were compared before: it's the files.
            raise DamagedStep(self._folder, step, [Wrong("state", reason_of(error))]) from error

    def _verify_once(self, step: int) -> None:
        """Verifies a step unless this reader has, and nothing was saved in its place since."""
        if step not in self._verified or self._verified[step] != step_meta.read_manifest(self._folder, step):
            self.verify(step)
        if self._verified[step] is None and step not in self._told_unverified:
            self._told_unverified.add(step)
            print_line(
                f"the checkpoint of step {step} in {self._folder} has no manifest, since an older aimv2_jax wrote it: "
                "its files are not verified",
                sys.stderr,
            )

    def _record(self) -> dict[int, Evaluation | None]:
        return _read_record(self._folder)


@dataclasses.dataclass(frozen=True)
class Damage:
    """A damaged step: what is wrong with its files, and the folder beside the steps that they were moved to."""

    step: int
    wrong: tuple[Wrong, ...]
    moved_to: str

    def __str__(self) -> str:
        return (
            f"the checkpoint of step {self.step} is damaged and was set aside as {FOLDER}/{self.moved_to}: "
            f"{step_meta.shortened(self.wrong)}"
        )


class Checkpointer(CheckpointReader):
    """Saves a run's state without stopping it, and keeps the newest, the best and some more; every process makes one.

    A save that failed on any process is told once on all of them, for the next save to make up for it; the second
    failure in a row is raised. What cannot be deleted fails no save: it is told once, and tried again before each.

    Args:
      workdir: the run's folder; half-written steps that a killed run left in it are swept away.
      keep: how many of the newest steps are kept. The best is kept beside them.
      keep_steps: steps that are kept, too. All others are deleted.
    """

    def __init__(self, workdir: str | Path, keep: int, keep_steps: Collection[int] = ()):
        super().__init__(workdir)
        logging.getLogger("absl").addFilter(is_news)
        make_folder(self._folder, "--workdir")
        self._keep, self._keep_steps = keep, frozenset(keep_steps)
        self._pending: concurrent.futures.Future[_Outcome] | None = None
        self._failure: UserError | None = None  # Of the newest save; None when it has not failed.
        self._is_told, self._failures = False, 0  # In a row.
        self._undeleted: dict[str, str] = {}
        self._sweep()
        self._unreadable: set[int] = set()
        self._known = _read_record(self._folder, self._unreadable)
        self._finisher = concurrent.futures.ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._barrier = SaveBarrier()
        options = ocp.AsyncOptions(
            timeout_secs=_NO_LIMIT_S,
            barrier_sync_fn=self._barrier,
            # In the background, Orbax waits for folders by the wall clock, and for minutes where one cannot be made.
            # In the foreground, other processes would wait for that in a collective, without end.
            create_directories_asynchronously=jax.process_count() > 1,
        )
        handler = ocp.CompositeCheckpointHandler(composite_options=ocp.CompositeOptions(async_options=options))
        self._orbax = ocp.AsyncCheckpointer(handler, async_options=options)
        self._loops = contextlib.ExitStack()
        self._loops.enter_context(PatientEventLoops())

    def steps(self) -> list[int]:
        self._settle(block=False)
        return sorted(self._known)

    def newest_intact(self) -> tuple[int | None, list[Damage]]:
        """The newest step whose files are all what was saved, and the damaged ones, which are set aside.

        To be called once at a start, by every process; all get what process 0 finds. Steps older than the intact one
        are not read, those apart whose meta is damaged. None where the run has no steps.

        Raises:
          UserError: when there are steps and none is intact; then all stay where they are.
        """
        self._settle(block=True)
        found = self._find_intact() if jax.process_index() == 0 else None
        found = processes.agree(f"newest intact checkpoint {next(_turns)}", found, _NO_LIMIT_S)
        wrong = {step: tuple(Wrong(*pair) for pair in pairs) for step, pairs in found["wrong"]}
        if found["step"] is None and wrong:
            raise UserError(
                f"no checkpoint in {self._folder} is intact",
                "; ".join(f"step {step}: {step_meta.shortened(files[:1])}" for step, files in wrong.items()),
                f"See all of it by python -m aimv2_jax.train.verify {self._folder.parent}; put an intact copy back, or "
                "give another --workdir to start anew",
            )
        self._forget(wrong)
        return found["step"], [Damage(step, wrong[step], name) for step, name in found["moved"]]

    def set_aside_newer(self, step: int, why: str) -> list[int]:
        """Makes all steps newer than `step` no steps any more, and returns them; to be called by every process.

        Their files are kept, also those of the best and of `keep_steps`: they belong to a course that the run leaves,
        and would be taken for its newest.

        Args:
          step: the newest that stays; a save in progress is waited for, and doesn't.
          why: a word in small letters, such as "rewound".
        """
        assert re.fullmatch("[a-z]+", why), why
        self._settle(block=True)
        newer = sorted(known for known in self._known if known > step)
        if jax.process_index() == 0:
            for known in reversed(newer):  # A kill in between leaves the course as it was, shorter.
                step_folders.set_aside(self._folder, known, why)
        processes.agree(f"checkpoints set aside {next(_turns)}", True, _NO_LIMIT_S)
        self._forget(newer)
        return newer

    def save(
        self,
        step: int,
        state: Any,
        config: Config | None,
        eval_loss: float | None = None,
        extra: Mapping[str, Any] | None = None,
    ) -> UserError | None:
        """Starts to save `state` as `step`, after the save before has ended.

        On return the arrays are copied: the caller may donate them. They are written in the background.

        Args:
          step: the number of steps that made `state`; not yet among `steps()`.
          state: a pytree of `jax.Array`.
          config: the run's; goes into `meta`. None: parameters of unknown making.
          eval_loss: the held-out loss of this very state, of its average where it has one; a loss that isn't finite
            counts as none.
          extra: whatever else shall stand in `meta`, as JSON.

        Returns:
          A first failure that nobody was told of yet: that of the save before, which this one makes up for, or of the
          start of this one, which was tried again at once. This save is on its way in any case.

        Raises:
          UserError: at the second failure in a row.
        """
        self._settle(block=True)
        failed = self._tell()
        assert step not in self._known, f"step {step} is saved already"
        meta = {
            "format_version": FORMAT_VERSION,
            "step": step,
            "config": {} if config is None else config_to_dict(config),
            "eval_loss": float(eval_loss) if eval_loss is not None and math.isfinite(eval_loss) else None,
            "extra": dict(extra or {}),
            "leaves": step_meta.leaves(state),
        }
        num_bytes = state_bytes(state)
        while (name := self._start(step, state, meta, num_bytes)) is None:
            failed = self._tell()
        self._pending = self._finisher.submit(self._finish, step, name, num_bytes, meta)
        return failed

    def check_errors(self) -> UserError | None:
        """The error of a save that failed in the background, once; costs nothing, to be called every step.

        In a run of one process the caller saves the state that it has now: nothing else makes up for the step that was
        not written. The processes of a run learn of it at different steps, and must save the same one: there, the next
        save that is due makes up for it.

        Raises:
          UserError: at the second failure in a row.
        """
        self._settle(block=False)
        return self._tell()

    def wait(self) -> None:
        """Returns when the save in progress is complete, and steps that need not be kept are gone.

        Raises:
          UserError: when the newest save could not be written, even if that was told before: no other made up for it.
            The steps that were there before still are.
        """
        self._settle(block=True)
        self._raise_failure()

    def settle(self) -> None:
        """Returns when no save is in progress; if it failed, `check_errors` tells."""
        self._settle(block=True)

    def restore(self, step: int, abstract_state: Any) -> Any:
        self.settle()
        return super().restore(step, abstract_state)

    def restore_part(self, step: int, abstract_part: Any) -> Any:
        self.settle()
        return super().restore_part(step, abstract_part)

    def close(self) -> None:
        """Waits for the save in progress, and ends the background threads; raises what `wait` raises."""
        try:
            self.wait()
        finally:
            self._finisher.shutdown()
            self._sweep()
            self._orbax.close()
            self._loops.close()

    def __enter__(self) -> Checkpointer:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _record(self) -> dict[int, Evaluation | None]:
        self._settle(block=False)
        return self._known

    def _find_intact(self) -> dict[str, Any]:
        """On process 0: what `newest_intact` tells, as JSON; has set aside what is damaged, if anything is intact."""
        newest, wrong = None, {}
        for step in sorted(self._known, reverse=True):
            if newest is not None and step not in self._unreadable:
                continue
            try:
                self.verify(step)
                newest = step
            except DamagedStep as error:
                wrong[step] = error.wrong
        moved = (
            [] if newest is None else [(step, step_folders.set_aside(self._folder, step, "damaged")) for step in wrong]
        )
        files = [(step, [dataclasses.astuple(file) for file in files]) for step, files in wrong.items()]
        return {"step": newest, "wrong": files, "moved": moved}

    def _forget(self, steps: Collection[int]) -> None:
        self._unreadable -= set(steps)
        self._known = {step: known for step, known in self._known.items() if step not in steps}

    def _start(self, step: int, state: Any, meta: Mapping[str, Any], num_bytes: int) -> str | None:
        """Has Orbax begin a save; the name of its folder, or None where that fails, and the reason is kept to be told.

        Process 0 tries the disk first, for all: they begin together, or none of them does.
        """
        turn = next(_turns)
        begun = self._new_place(step) if jax.process_index() == 0 else None
        begun = processes.agree(f"begin of checkpoint {turn}", begun, _NO_LIMIT_S)
        if begun["reason"] is not None:
            self._fail(self._not_written(step, num_bytes, begun["reason"]))
            return None
        self._barrier.begin(f"checkpoint {turn}")
        try:
            with jax.transfer_guard("allow"):
                self._orbax.save(
                    self._folder / begun["name"],
                    args=ocp.args.Composite(state=ocp.args.StandardSave(state), meta=ocp.args.JsonSave(meta)),
                    force=True,  # Replaces what a killed save left where nothing is renamed; never a whole step.
                )
        except OSError as error:
            if jax.process_count() > 1:  # The others may be in a collective of this save.
                raise
            self._fail(self._not_written(step, num_bytes, reason_of(error)))
            return None
        return begun["name"]

    def _new_place(self, step: int) -> dict[str, str | None]:
        """On process 0: the folder of a save that begins, or why it cannot."""
        self._sweep()  # What a failed save left would take the room of this one.
        try:
            return {"name": step_folders.new_place(self._folder, step), "reason": None}
        except OSError as error:
            return {"name": None, "reason": reason_of(error)}

    def _finish(self, step: int, name: str, num_bytes: int, meta: Mapping[str, Any]) -> _Outcome:
        """In the background: sees a save through, makes it a step, and deletes those that need not be kept."""
        self._barrier.forget_before()
        reason = self._write(step, name, meta)
        # It is a step on all processes, or on none.
        reason = processes.agree(f"end of {self._barrier.save}", reason, _NO_LIMIT_S)
        if reason is not None:
            return _Outcome(self._known, self._not_written(step, num_bytes, reason))
        record = {**self._known, step: step_meta.evaluation(meta)}
        kept = {*sorted(record)[-self._keep :], step_meta.best(record), *self._keep_steps, *self._unreadable}
        left = {step: known for step, known in record.items() if step in kept}
        if jax.process_index() == 0:
            for old in record.keys() - kept:
                undeleted = step_folders.delete(self._folder, old)
                self._tell_undeleted(undeleted)
                if undeleted and old in step_folders.committed_steps(self._folder):
                    left[old] = record[old]
        return _Outcome(left, None)

    def _write(self, step: int, name: str, meta: Mapping[str, Any]) -> str | None:
        """Waits until no process writes any more, and makes the step one; the reason where that cannot be."""
        reason = None
        try:
            self._orbax.wait_until_finished()
        except PeerFailed as error:
            reason = str(error)
        # ValueError is TensorStore's for a full disk, JaxRuntimeError Orbax's where process 0 could make no folders.
        except (OSError, ValueError, jax.errors.JaxRuntimeError) as error:
            reason = self._barrier.fail(reason_of(error))
            _wait_for_writers()
        if jax.process_count() > 1:
            self._barrier.end()
        if reason is None and jax.process_index() == 0:
            try:
                step_folders.commit(self._folder, name, step, step_meta.about(meta))
            except (OSError, ValueError) as error:
                reason = self._barrier.fail(reason_of(error))
        return reason

    def _sweep(self) -> None:
        """Deletes what saves and deletions that came to nothing have left, as far as that can be done."""
        try:
            undeleted = step_folders.sweep(self._folder)
            self._undeleted = {name: why for name, why in self._undeleted.items() if (self._folder / name).exists()}
        except OSError:  # The folder cannot be read, or is gone: a save that needs it tells.
            return
        self._tell_undeleted(undeleted)

    def _tell_undeleted(self, undeleted: Mapping[str, str]) -> None:
        """Prints what cannot be deleted, each once; the run goes on."""
        news = undeleted.keys() - self._undeleted.keys()
        self._undeleted |= undeleted
        for name in sorted(news):
            print_line(
                f"could not delete {self._folder / name} ({undeleted[name]}): it is tried again before each save "
                f"({len(self._undeleted)} in all)",
                sys.stderr,
            )

    def _settle(self, block: bool) -> None:
        """Takes note of how the save in progress ended, if it has; with `block`, waits for that."""
        if self._pending is None or not (block or self._pending.done()):
            return
        pending, self._pending = self._pending, None
        outcome = pending.result()
        self._known = outcome.known
        if outcome.failure is None:
            self._failure, self._failures = None, 0
        else:
            self._fail(outcome.failure)

    def _fail(self, failure: UserError) -> None:
        self._failure, self._is_told = failure, False
        self._failures += 1

    def _tell(self) -> UserError | None:
        """The failure that nobody was told of, if there is one; raises the second in a row."""
        if self._failure is None or self._is_told:
            return None
        if self._failures > 1:
            self._raise_failure()
        self._is_told = True
        return self._failure

    def _raise_failure(self) -> None:
        if self._failure is not None:
            failure, self._failure = self._failure, None
            raise failure

    def _not_written(self, step: int, num_bytes: int, reason: str) -> UserError:
        try:
            free = step_folders.free_bytes(self._folder)
        except OSError:  # The disk is gone.
            free = None
        room = "" if free is None else f" ({human_bytes(free)} free)"
        last = max((known for known in self._known if known != step), default=None)
        good = "no checkpoint was written before" if last is None else f"the last good one, step {last}, is untouched"
        return UserError(
            f"could not write the checkpoint of step {step}, which needs {human_bytes(num_bytes)}{room}",
            reason,
            f"Make room in {self._folder} or mend what is said above, and start the same command again; {good}",
        )


@dataclasses.dataclass(frozen=True)
class _Outcome:
    """How a save ended: the steps that there are, and why it failed, if it did."""

    known: dict[int, Evaluation | None]
    failure: UserError | None


def _wait_for_writers() -> None:
    """Waits for Orbax's threads: it tells of the first write that fails, while others go on in the same folder."""
    for thread in threading.enumerate():
        if type(thread).__module__.startswith("orbax."):
            threading.Thread.join(thread)  # Orbax's own `join` raises what the thread has raised.


def _read_record(folder: epath.Path, unreadable: set[int] | None = None) -> dict[int, Evaluation | None]:
    """What is known of every step of the run; those with a damaged meta go to `unreadable`, or are an error."""
    record = {}
    for step in step_folders.committed_steps(folder):
        try:
            record[step] = step_meta.evaluation(step_meta.read_meta(folder, step))
        except StepVanished:  # A running trainer deleted it since: no longer one of the run's checkpoints.
            continue
        except DamagedStep:
            if unreadable is None:
                raise
            unreadable.add(step)
            record[step] = None
    return record


def _fresh_leaves(abstract: Any, meta: Mapping[str, Any]) -> dict[str, Any]:
    """The leaves that a step of an older format lacks and that start as zeros, by path."""
    if meta["format_version"] > 1:
        return {}
    leaves = jax.tree_util.tree_leaves_with_path(abstract)
    named = {step_meta.leaf_path(path): leaf for path, leaf in leaves}
    return {path: leaf for path, leaf in named.items() if path.startswith(_FILLED) and path not in meta["leaves"]}


def _zeros(leaf: jax.ShapeDtypeStruct) -> jax.Array:
    shape = leaf.sharding.shard_shape(leaf.shape)
    return jax.make_array_from_callback(leaf.shape, leaf.sharding, lambda _: np.zeros(shape, leaf.dtype))


def _map_paths(change: Callable[[str, Any], Any], tree: Any) -> Any:
    return jax.tree_util.tree_map_with_path(lambda path, leaf: change(step_meta.leaf_path(path), leaf), tree)


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
    if which != "best" and (step_folders.absolute(spec) / FOLDER).is_dir():
        workdir, which = str(spec), "best"
    if not workdir or not step_folders.absolute(workdir).is_dir():
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
        raise UserError(f"{key}: the run has no such step", int(which), step_meta.there(steps))
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
    free = step_folders.free_bytes(step_folders.absolute(workdir))
    if free is not None and free < 2 * state_bytes:
        raise UserError(
            f"--workdir {workdir}: too little room for two checkpoints of {human_bytes(state_bytes)}",
            f"{human_bytes(free)} free, {human_bytes(2 * state_bytes)} needed",
            "Make room there, or give a --workdir on another disk",
        )
