"""Saves of a running training loop: their time, their events, and the repetition of those that failed."""

from __future__ import annotations

import time

import jax

from aimv2_jax.checkpoint.checkpointer import SaveError
from aimv2_jax.config.schema import Config
from aimv2_jax.monitoring.events import EventKind, TimeClass
from aimv2_jax.monitoring.log import logger
from aimv2_jax.resilience.progress import TrainProgress
from aimv2_jax.train.resources import Resources
from aimv2_jax.train.step import TrainState


class Saver:
    """Saves states of a run.

    Args:
      config: of the run, which checkpoints store.
      resources: of the run.

    Attributes:
      must_save: whether a save failed, and the next step that can be saved makes up for it.
    """

    def __init__(self, config: Config, resources: Resources):
        self.must_save = False
        self._config = config
        self._resources = resources
        self._checkpointer = resources.checkpointer
        self._first_step = resources.checkpointer.latest_step() or 0  # Where this process began.
        self._stall_s = 0.0

    def save(self, progress: TrainProgress, state: TrainState, eval_loss: float | None) -> None:
        """Starts the save of a step, after the metrics and events of the steps before are flushed."""
        resources = self._resources
        begin_s = time.perf_counter()
        with (
            resources.time_accounting.on(TimeClass.SAVING),
            resources.watchdog.watching("save", progress.step),
        ):
            resources.writer.flush()
            resources.bad_records.flush()
            resources.events.flush()
            start_s = time.perf_counter()
            failure = self._checkpointer.save(progress.step, state, self._config, eval_loss, progress.to_meta())
            self.must_save = False
            if failure is not None:
                self._log_failure(progress.step, failure, f"with step {progress.step}")
            self._retire_failures()
            self._stall_s += time.perf_counter() - start_s
        seconds = round(time.perf_counter() - begin_s, 3)
        resources.events.write(EventKind.SAVE, progress.step, seconds=seconds)

    def check_background(self, number: int) -> None:
        """Logs the first failure of a background save, and has step `number` or the next finite one saved instead.

        Several processes do not see a failure at the same step: with them, the next save that is due makes up for it.
        """
        failure = self._checkpointer.check_errors()
        if failure is not None:
            self.must_save = jax.process_count() == 1
            instead = f"with step {number}, or with the next finite step after it"
            self._log_failure(number, failure, instead if self.must_save else "with the next save")

    def wait(self, step: int) -> None:
        """Waits for the save in progress; `step` is the last one of the run."""
        resources = self._resources
        with resources.time_accounting.on(TimeClass.SAVING), resources.watchdog.watching("save", step):
            self._checkpointer.wait()
            self._retire_failures()

    def take_stall_s(self) -> float:
        """Time blocked on saves since the last call."""
        stall_s = self._stall_s
        self._stall_s = 0.0
        return stall_s

    def _log_failure(self, number: int, failure: SaveError, when: str) -> None:
        logger.info(f"{str(failure).removesuffix('.')}. The save is tried once more, {when}.")
        self._resources.events.write(EventKind.SAVE_FAILED, number, why=str(failure))

    def _retire_failures(self) -> None:
        """Stops counting hangs and failures up to the newest step that was saved since the start."""
        saved = self._checkpointer.latest_step()
        if saved is not None and saved > self._first_step:
            self._resources.watchdog.failures.retire(saved)
