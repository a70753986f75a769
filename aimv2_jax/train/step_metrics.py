"""Metrics of dispatched steps: reads them from the devices, judges them, and logs them."""

from __future__ import annotations

import enum
import math
from collections.abc import Mapping
from typing import NamedTuple

import jax

from aimv2_jax.data import pipeline
from aimv2_jax.data.sampling.mixture import MixtureSampler
from aimv2_jax.errors import TrainingAborted
from aimv2_jax.monitoring.counters import ExampleCounter
from aimv2_jax.monitoring.events import EventKind
from aimv2_jax.monitoring.flops import model_flops_utilisation
from aimv2_jax.monitoring.input_stalls import InputMonitor
from aimv2_jax.monitoring.log import logger
from aimv2_jax.monitoring.metrics import ProgressLine, Stopwatch
from aimv2_jax.monitoring.nonfinite import write_record
from aimv2_jax.parallel.rules import replicated
from aimv2_jax.resilience.rewind import Spike
from aimv2_jax.storage.retries import DATA_RETRIES, STORAGE_RETRIES
from aimv2_jax.train.builder import TrainSetup
from aimv2_jax.train.compiled_step import CompiledStep
from aimv2_jax.train.resources import Resources
from aimv2_jax.train.saving import Saver


class Outcome(enum.Enum):
    """Result of a step, or of several: whether the run goes on, and how."""

    CONTINUE = enum.auto()
    REWIND = enum.auto()  # A spike; the state is restored from before it.
    STOPPED = enum.auto()  # The run was asked to stop, and its last step is saved.
    FINISHED = enum.auto()


class PendingStep(NamedTuple):
    """A dispatched step whose metrics are not read yet.

    Attributes:
      number: of the step.
      batch: index of its batch.
      metrics: on the devices.
      counts: cumulative examples and bad records, this step included.
      program: the compiled step.
    """

    number: int
    batch: int
    metrics: Mapping[str, jax.Array]
    counts: jax.Array
    program: CompiledStep


class StepMetrics:
    """Reads, judges and logs the metrics of steps.

    Args:
      setup: the config on its mesh.
      resources: of the run.
      sampler: maps batches to examples.
      saver: knows how long steps were blocked on saves.

    Attributes:
      stopwatch: to be paused outside of steps.
      counter: of examples and bad records.
      input_monitor: of the input pipeline.
      last_step: the last step whose metrics were read.
      consecutive_nonfinite: number of consecutive non-finite steps, up to that step.
      spike: the last spike that calls for a rewind.
    """

    def __init__(self, setup: TrainSetup, resources: Resources, sampler: MixtureSampler, saver: Saver):
        config = setup.config
        self.stopwatch = Stopwatch()
        self.counter = ExampleCounter(list(config.data.sources), pipeline.REASONS, replicated(setup.mesh))
        self.input_monitor = InputMonitor(
            workers=config.data.workers,
            read_threads=config.data.read_threads,
            prefetch=config.data.prefetch,
            builders=pipeline.builders(config.data.workers),
            cores=pipeline.cores(),
        )
        self.last_step = 0
        self.consecutive_nonfinite = 0
        self.spike: Spike | None = None
        self._config = config
        self._devices = list(setup.mesh.devices.flat)
        self._resources = resources
        self._sampler = sampler
        self._saver = saver
        self._progress_line = ProgressLine(config.train.steps)

    def begin(self, step: int) -> None:
        """Begins after a restore of the state of `step`."""
        self.last_step = step
        self.consecutive_nonfinite = 0

    def read(self, pending: PendingStep) -> Outcome:
        """Waits for a dispatched step, checks its metrics for anomalies, and logs them where that is due.

        Raises:
          TrainingAborted: at the limit of non-finite steps or of bad records.
        """
        number = pending.number
        with self._resources.watchdog.watching("step", number):
            values = {name: float(value) for name, value in jax.device_get(pending.metrics).items()}
        self.stopwatch.count(pending.program.shape.examples, pending.program.flops)
        self.last_step = number
        self._check_finite(pending, values)
        if self._check_spike(pending, values) is Outcome.REWIND:
            return Outcome.REWIND
        if number % self._config.train.log_every == 0 or number == self._config.train.steps:
            self._log(pending, values)
        return Outcome.CONTINUE

    def _log(self, pending: PendingStep, values: dict[str, float]) -> None:
        number = pending.number
        events = self._resources.events
        values |= self.stopwatch.lap()
        values["save_stall_s"] = self._saver.take_stall_s()
        if retries := STORAGE_RETRIES.take():
            values["storage_retries"] = retries
        values["mfu"] = model_flops_utilisation(self._config, values["model_tflops_per_s"], self._devices)
        input_values, advice = self.input_monitor.lap(values["step_time_s"], values["data_wait_fraction"])
        counts = self.counter.lap(pending.counts)
        if retries := DATA_RETRIES.take():  # Of this process itself, as when it opens the data.
            counts["data_read_retries"] = counts.get("data_read_retries", 0) + retries
        epochs = {f"epochs/{name}": passes for name, passes in self._sampler.epochs(pending.batch + 1).items()}
        self._resources.writer.write(number, values | input_values | counts | epochs)
        events.write(EventKind.PROGRESS, number, **self._resources.time_accounting.seconds())
        bad = {name.removeprefix("bad/"): count for name, count in counts.items() if name.startswith("bad/")}
        if bad:
            events.write(EventKind.BAD_DATA, number, counts=bad)
        logger.info(self._progress_line.text(number, values))
        if advice is not None:
            logger.info(advice)
        self.counter.check(self._config.data.max_bad_fraction)

    def _check_finite(self, pending: PendingStep, values: Mapping[str, float]) -> None:
        """Records a non-finite step, which has changed no parameter; aborts the run after `guard.max_nonfinite`."""
        self.consecutive_nonfinite = int(values["nonfinite_steps"])
        if not self.consecutive_nonfinite:
            return
        number = pending.number
        limit = self._config.guard.max_nonfinite
        nonfinite = next(name for name in ("loss", "grad_norm") if not math.isfinite(values[name]))
        first = self._sampler.schedule.first_example(pending.batch)
        examples = [first, first + pending.program.shape.examples]
        record = {"batch": pending.batch, "examples": examples, "seed": self._config.seed}
        file = write_record(self._resources.workdir, number, record, values)
        message = f"{nonfinite} is {values[nonfinite]} at step {number}"
        self._resources.events.write(
            EventKind.NONFINITE, number, loss=values["loss"], grad_norm=values["grad_norm"], file=file
        )
        if self.consecutive_nonfinite < limit:
            see = "" if file is None else f"; see {file}"
            row = f"{self.consecutive_nonfinite} in a row, {limit} end the run"
            logger.info(f"{message}: its update is skipped ({row}){see}")
            return
        raise TrainingAborted(
            f"{message}, the last of {self.consecutive_nonfinite} non-finite steps in a row, the limit of "
            f"guard.max_nonfinite. Their updates were skipped; {self._resources.newest_checkpoint()}. "
            f"To look into it, run the same command with --replay {number}"
        )

    def _check_spike(self, pending: PendingStep, values: Mapping[str, float]) -> Outcome:
        """Logs a spike and the action taken; stores `spike` where the run is to be rewound."""
        settings = self._config.guard
        zscores = {name: values[f"{name}_zscore"] for name in ("loss", "grad_norm")}
        if settings.spike == "off" or max(zscores.values()) <= settings.spike_sigma:
            return Outcome.CONTINUE
        name = max(zscores, key=lambda name: zscores[name])
        number = pending.number
        message = (
            f"{name} is {values[name]:.4g} at step {number}, {zscores[name]:.1f} standard deviations above the mean of "
            "the steps before"
        )
        logged = {name: values[name] for name in zscores}
        self._resources.events.write(EventKind.SPIKE, number, values=logged, action=settings.spike)
        if settings.spike == "rewind":
            self.spike = Spike(number, pending.batch, message)
            return Outcome.REWIND
        logger.info(f"spike: {message}" + ("; its update is skipped" if values["skipped"] else ""))
        return Outcome.CONTINUE
