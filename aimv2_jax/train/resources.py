"""The files, logs and threads of a training run, which the trainer opens and the loop uses."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable

from etils import epath

from aimv2_jax.checkpoint.checkpointer import Checkpointer
from aimv2_jax.data.pipeline import Sources
from aimv2_jax.data.tokenizer import Tokenizer
from aimv2_jax.errors import StorageError, UserError
from aimv2_jax.monitoring.counters import BadRecordFile
from aimv2_jax.monitoring.events import EventLog, TimeAccounting
from aimv2_jax.monitoring.metrics import MetricsWriter
from aimv2_jax.monitoring.profiler import Profiler
from aimv2_jax.resilience.progress import TrainProgress
from aimv2_jax.resilience.watchdog import Watchdog
from aimv2_jax.train.step import TrainState


@dataclasses.dataclass(frozen=True)
class Resources:
    """What a training loop reads from, writes to and reports to.

    Attributes:
      workdir: the run's folder.
      tokenizer: for the captions.
      sources: the open datasets for training and evaluation.
      checkpointer: writes and restores the state.
      writer: of the metrics.
      bad_records: list of the records that could not be used.
      events: the event log.
      profiler: traces the steps of config train.profile.
      watchdog: ends the process where something hangs.
      initial_state: returns the state and progress of a run that has no checkpoint.
      time_accounting: time by class since the first step of this start.
    """

    workdir: epath.Path
    tokenizer: Tokenizer
    sources: Sources
    checkpointer: Checkpointer
    writer: MetricsWriter
    bad_records: BadRecordFile
    events: EventLog
    profiler: Profiler
    watchdog: Watchdog
    initial_state: Callable[[], tuple[TrainState, TrainProgress]]
    time_accounting: TimeAccounting = dataclasses.field(default_factory=TimeAccounting)

    def newest_checkpoint(self) -> str:
        """A clause for error messages that names the newest checkpoint."""
        # A failed save is raised here; the caller's own message ends the run.
        with contextlib.suppress(UserError, StorageError), self.watchdog.watching("save"):
            self.checkpointer.wait()  # A save may be in progress.
        latest = self.checkpointer.latest_step()
        return "there is no checkpoint yet" if latest is None else f"the newest checkpoint is that of step {latest}"
