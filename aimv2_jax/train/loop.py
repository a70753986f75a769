"""The training loop. It is the only owner of the state that changes during a run.

The order of a step is a contract:

1. take the batch of step i (the devices are still busy with step i-1), and transfer it to the devices;
2. dispatch step i;
3. only then read the metrics of step i-1, so that the devices never wait for the host; this read detects non-finite
   steps and spikes;
4. where step i is due to be evaluated or saved: read its own metrics first, then evaluate, then save. The checkpoint
   records the evaluation of exactly this state. A failed save makes the next step due. A non-finite step is not saved,
   except as the last step or as the step at which a stop request ends the run: its state is that of the steps before.

A run that is asked to stop (resilience/preemption.py) saves step i, the same on all processes, and ends; a running
evaluation is abandoned. A spike may rewind the run (resilience/rewind.py). Every decision here is the same on every
process: it follows from the step number, from values that all processes have, or from `coordination.broadcast`.
"""

from __future__ import annotations

import contextlib
import math
import os
import shlex
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import numpy as np
from etils import epath

from aimv2_jax.checkpoint.checkpointer import Checkpointer
from aimv2_jax.config import BatchShape
from aimv2_jax.console import print_line
from aimv2_jax.data import pipeline
from aimv2_jax.data.tokenizer import Tokenizer
from aimv2_jax.distributed import coordination
from aimv2_jax.errors import EXIT_FINISHED, EXIT_RETRY, StorageError, TrainingAborted, UserError
from aimv2_jax.monitoring.counters import BadRecordFile, ExampleCounter
from aimv2_jax.monitoring.events import EventLog, TimeAccounting
from aimv2_jax.monitoring.flops import flops_per_example, model_flops_utilisation
from aimv2_jax.monitoring.input_stalls import InputMonitor
from aimv2_jax.monitoring.metrics import MetricsWriter, ProgressLine, Stopwatch
from aimv2_jax.monitoring.nonfinite import write_record
from aimv2_jax.monitoring.profiler import Profiler
from aimv2_jax.parallel.mesh import local_rows
from aimv2_jax.parallel.rules import replicated
from aimv2_jax.resilience import device_errors
from aimv2_jax.resilience.preemption import PreemptionHandler
from aimv2_jax.resilience.progress import TrainProgress
from aimv2_jax.resilience.rewind import Spike, plan_rewind
from aimv2_jax.resilience.storage_failures import storage_failure
from aimv2_jax.resilience.watchdog import Watchdog
from aimv2_jax.train.builder import TrainSetup
from aimv2_jax.train.evaluate import evaluate
from aimv2_jax.train.sdc_check import Mismatch, SdcCheck
from aimv2_jax.train.step import AveragedState, TrainState


class _CompiledStep(NamedTuple):
    """The train step for one batch shape: host-to-device transfer, compiled function, model FLOPs of a batch."""

    put: Callable[[Mapping[str, np.ndarray]], dict[str, jax.Array]]
    compiled: Callable[..., Any]
    flops: float


class _PendingStep(NamedTuple):
    """A dispatched step whose metrics are not read yet.

    Attributes:
      number: of the step.
      batch: index of its batch.
      metrics: on the devices.
      counts: cumulative examples and bad records, this step included.
      examples: in this step's batch.
      flops: model FLOPs of this step.
    """

    number: int
    batch: int
    metrics: Mapping[str, jax.Array]
    counts: jax.Array
    examples: int
    flops: float


class _StopRequested(Exception):
    """The run was asked to stop while it was evaluating."""


class TrainLoop:
    """The loop's mutable state and resources, apart from the train state itself.

    Args:
      initial_state: returns the state and progress of a run that has no checkpoint.
    """

    def __init__(
        self,
        setup: TrainSetup,
        workdir: epath.Path,
        tokenizer: Tokenizer,
        checkpointer: Checkpointer,
        writer: MetricsWriter,
        events: EventLog,
        profiler: Profiler,
        watchdog: Watchdog,
        initial_state: Callable[[], tuple[TrainState, TrainProgress]],
    ):
        config = setup.config
        self.setup = setup
        self.config = config
        self.workdir = workdir
        self.tokenizer = tokenizer
        self.checkpointer = checkpointer
        self.writer = writer
        self.events = events
        self.profiler = profiler
        self.watchdog = watchdog
        self.initial_state = initial_state
        # Without evaluation, eval.batch_size need not fit the devices.
        self.eval_rows = local_rows(setup.batch_sharding, config.eval.batch_size) if config.eval.sources else range(0)
        self.counter = ExampleCounter(list(config.data.sources), pipeline.REASONS, replicated(setup.mesh))
        self.preemption = PreemptionHandler()
        self.sampler = pipeline.training_sampler(config, pipeline.open_sources(config.data.sources))
        self.bad_records: BadRecordFile | None = None  # Opened by `_train_from`.
        self.compiled: dict[BatchShape, _CompiledStep] = {}
        self.sdc_check: SdcCheck | None = None
        self.stopwatch = Stopwatch()
        self.time_accounting = TimeAccounting()
        self.save_stall_s = 0.0  # Time blocked on saves since the last log line.
        self.input_monitor = InputMonitor(
            workers=config.data.workers,
            read_threads=config.data.read_threads,
            prefetch=config.data.prefetch,
            builders=pipeline.builders(config.data.workers),
            cores=pipeline.cores(),
        )
        self.progress_line = ProgressLine(config.train.steps)
        # Holds the signal handlers, and the watch on the end of a run that was asked to stop.
        self.exit_stack = contextlib.ExitStack()
        # Whether the barrier on the first batch has passed; once in the life of a process.
        self.first_batch_synced = False
        self.first_step = 0  # The step whose state the process began with.
        self.current_step = 0  # The step that is being dispatched, waited for, or evaluated.
        self.last_read_step = 0  # The last step whose metrics were read.
        self.consecutive_nonfinite = 0  # Consecutive non-finite steps, up to the last one read.
        self.must_save = False  # Whether a save failed, and the next step that can be saved makes up for it.
        self.last_step_unevaluated = False  # Whether a stop request came during the evaluation of the last step.

    def train(self, state: TrainState, progress: TrainProgress) -> int:
        """Trains to the last step, or until it is asked to stop; returns the exit code."""
        self.first_step = self.current_step = progress.step
        running = device_errors.running(lambda: self.current_step, self.watchdog.failures, self.events)
        with jax.transfer_guard("disallow"), running, self.exit_stack:
            while True:
                spike = None
                try:
                    stopped = self._train_from(state, progress)
                    break
                except Spike as error:
                    spike = error.with_traceback(None)  # The traceback's frames would keep the state alive.
                del state
                state, progress = self._rewind(spike, progress)
        steps = self.config.train.steps
        if stopped is not None:
            log(f"stopped on request: step {stopped} of {steps} is saved; the same command continues from it")
            self.events.write("progress", stopped, **self.time_accounting.seconds())
            self.events.write("preemption", stopped)
            self.events.write("stop", stopped, code=EXIT_RETRY, why="asked to stop")
            return EXIT_RETRY
        reason = "finished"
        message = f"finished: step {steps}, best checkpoint at step {self.checkpointer.best_step()}"
        if self.last_step_unevaluated:
            reason += ", and asked to stop before the last step was evaluated"
            command = f"python -m aimv2_jax.eval.heldout --checkpoint={shlex.quote(f'{self.workdir}:{steps}')}"
            message += f"; step {steps} is not evaluated, since the run was asked to stop. To evaluate it: {command}"
        log(message)
        self.events.write("stop", steps, code=EXIT_FINISHED, why=reason)
        return EXIT_FINISHED

    def _train_from(self, state: TrainState, progress: TrainProgress) -> int | None:
        """Trains from `progress.step` on; returns the step at which a request stopped it, or None."""
        config = self.config
        self.last_read_step = progress.step
        self.consecutive_nonfinite = 0
        self.writer.cut_after(progress.step)
        with (
            BadRecordFile(self.workdir, jax.process_index(), progress.step) as self.bad_records,
            self._batches(progress) as batches,
        ):
            self._compile()
            if progress.step == 0 and config.train.eval_at_start and config.eval.sources:
                self._evaluate(0, state)
            stopped = self._run_steps(state, progress, batches)
            with self.time_accounting.on("saving"), self.watchdog.watching("save", self.last_read_step):
                self.checkpointer.wait()
                self._retire_failures()
        return stopped

    def _batches(self, progress: TrainProgress) -> pipeline.BatchIterator:
        """The batches from `progress` on; workers that stall for half of `watch.data_s` are restarted."""
        config = self.config
        rows_of = partial(local_rows, self.setup.batch_sharding)

        def log_restart(failure: pipeline.WorkerFailure) -> None:
            self.events.write("worker_restarted", self.last_read_step, what=failure.what, at=failure.at)

        return pipeline.training_batches(
            config, rows_of, progress.step, self.tokenizer, progress.skips, config.watch.data_s / 2, log_restart
        )

    def _compile(self) -> None:
        """Compiles the train step for all batch shapes, once, and the SDC check's step where there is one.

        Installs the signal handlers afterwards: before, there is nothing to save, and a SIGTERM ends the process at
        once.
        """
        config = self.config
        if self.compiled:
            return
        with jax.transfer_guard("allow"), device_errors.compiling():
            for shape in config.batch_shapes:
                begin_s = time.monotonic()
                self.compiled[shape] = self._compile_step(shape)
                self.events.write("compiled", self.last_read_step, seconds=round(time.monotonic() - begin_s, 3))
            if config.guard.sdc_check_every:
                log("compiling the step of the SDC check ...")
                steps = {shape: step.compiled for shape, step in self.compiled.items()}
                self.sdc_check = SdcCheck(self.setup, steps, config.guard.sdc_rotate_devices)
        self.time_accounting = TimeAccounting()
        self.exit_stack.enter_context(self.preemption)

    def _compile_step(self, shape: BatchShape) -> _CompiledStep:
        """Compiles the train step for batches of `shape`."""
        config = self.config
        sharding = self.setup.batch_sharding
        what = f" for {shape.examples:,} images of {shape.patches:,} patches" if config.data.areas else ""
        log(f"compiling the train step{what} ...")
        rows = local_rows(sharding, shape.examples)
        put = partial(pipeline.to_devices, sharding=sharding, rows=rows, global_rows=shape.examples)
        flops = flops_per_example(config, shape.patches) * shape.examples
        return _CompiledStep(put, self.setup.compile_step(shape), flops)

    def _run_steps(self, state: TrainState, progress: TrainProgress, batches: pipeline.BatchIterator) -> int | None:
        """Runs the contract at the head of this file; returns the step at which a request stopped it, or None."""
        config = self.config
        setup = self.setup
        pending = None  # The step that is dispatched and not yet read.
        self.stopwatch.lap()
        for number in range(progress.step + 1, config.train.steps + 1):
            if self.profiler.due(number):
                self._read_metrics(pending)
                pending = None
                with self.stopwatch.pause():
                    self.profiler.before(number)
            depth = batches.depth
            host = self._next_batch(batches, number, progress.skips.batch(number - 1))
            if not self.first_batch_synced:
                # The first collective has a shorter time-out than the other processes' workers may need.
                coordination.barrier("first batch", config.processes.barrier_timeout_s)
                self.first_batch_synced = True
            self.input_monitor.add(host.seconds, depth)
            shape = self.sampler.schedule.shape(host.step)
            step = self.compiled[shape]
            self.current_step = number
            with self.input_monitor.transferring(), self.watchdog.watching("step", number):
                batch = step.put(host.arrays)
            counts = self.counter.add(*(batch.pop(name) for name in pipeline.BOOKKEEPING))
            self.bad_records.write(number, host.faults)
            checked = self.sdc_check is not None and _every(config.guard.sdc_check_every, number)
            # The check starts before the step itself, which donates the memory of the state.
            with self.watchdog.watching("step", number):
                repeated = self.sdc_check.start(state, batch, shape) if checked else None
                with jax.profiler.StepTraceAnnotation("train", step_num=number):  # Marks the step for XProf.
                    state, metrics = step.compiled(state, batch, setup.rng)
                mismatches = [] if repeated is None else self.sdc_check.differences((state, metrics), repeated)
                del repeated
            self._check_mismatches(number, mismatches)
            self._read_metrics(pending)
            pending = _PendingStep(number, host.step, metrics, counts, shape.examples, step.flops)
            self._check_background_save(number)
            stopping = self.preemption.reached() and number < config.train.steps
            evaluating, saving = self._due(number)
            saving = saving or self.must_save
            if evaluating or saving or stopping:
                self._read_metrics(pending)
                pending = None
                with self.stopwatch.pause():
                    values = self._evaluate(number, state) if evaluating and not stopping else {}
                    stopping = stopping or (values is None and number < config.train.steps)
                    if stopping:
                        self.exit_stack.enter_context(self.watchdog.watching("stop", number))
                    # After a non-finite step the save waits for a finite one, unless this is the last step.
                    last = stopping or number == config.train.steps
                    if last or (saving and not self.consecutive_nonfinite):
                        self.last_step_unevaluated = values is None and not stopping
                        values = values or {}
                        # `pretrained/model.py` loads the average where there is one, so its loss is recorded.
                        eval_loss = values.get("eval_loss_ema", values.get("eval_loss"))
                        self._save(progress.at_step(number), state, eval_loss)
            if stopping:
                return number
        return None

    def _next_batch(self, batches: pipeline.BatchIterator, number: int, batch: int) -> pipeline.HostBatch:
        """Waits for the batch of step `number`, which has index `batch` in the sampler's order."""
        watching = self.watchdog.watching("data", number, batches.last_read)
        try:
            with self.stopwatch.waiting(), self.time_accounting.on("data"), watching:
                host = next(batches)
        except StorageError as error:
            examples = range(*map(self.sampler.schedule.first_example, (batch, batch + 1)))
            raise storage_failure(error, self.config, number, examples, self.watchdog.failures) from error
        assert host.step == batch
        return host

    def _check_background_save(self, number: int) -> None:
        """Logs the first failure of a background save, and has this step or the next finite one saved instead.

        Several processes do not see a failure at the same step: with them, the next save that is due makes up for it.
        """
        failure = self.checkpointer.check_errors()
        alone = jax.process_count() == 1
        if failure is not None:
            when = f"with step {number}, or with the next finite step after it" if alone else "with the next save"
            self._log_save_failure(number, failure, when)
            self.must_save = alone

    def _log_save_failure(self, number: int, failure: UserError, when: str) -> None:
        log(f"{failure} The save is tried once more, {when}.")
        self.events.write("save_failed", number, why=str(failure))

    def _save(self, progress: TrainProgress, state: TrainState, eval_loss: float | None) -> None:
        """Starts the save of a step, after the metrics and events of the steps before are flushed."""
        begin_s = time.perf_counter()
        with self.time_accounting.on("saving"), self.watchdog.watching("save", progress.step):
            self.writer.flush()
            self.bad_records.flush()
            self.events.flush()
            start_s = time.perf_counter()
            failure = self.checkpointer.save(progress.step, state, self.config, eval_loss, progress.to_meta())
            self.must_save = False
            if failure is not None:
                self._log_save_failure(progress.step, failure, f"with step {progress.step}")
            self._retire_failures()
            self.save_stall_s += time.perf_counter() - start_s
        self.events.write("save", progress.step, seconds=round(time.perf_counter() - begin_s, 3))

    def _retire_failures(self) -> None:
        """Stops counting hangs and failures up to the newest step that was saved since the start."""
        saved = self.checkpointer.latest_step()
        if saved is not None and saved > self.first_step:
            self.watchdog.failures.retire(saved)

    def _due(self, number: int) -> tuple[bool, bool]:
        """Whether the state after step `number` is evaluated, and whether it is saved; the last one is both."""
        settings = self.config.train
        last = number == settings.steps
        evaluating = bool(self.config.eval.sources) and (last or _every(settings.eval_every, number))
        return evaluating, last or _every(settings.save_every, number) or number in settings.keep_steps

    def _read_metrics(self, pending: _PendingStep | None) -> None:
        """Waits for a dispatched step, checks its metrics for anomalies, and logs them where that is due."""
        if pending is None:
            return
        number = self.current_step = pending.number
        with self.watchdog.watching("step", number):
            values = {name: float(value) for name, value in jax.device_get(pending.metrics).items()}
        self.stopwatch.count(pending.examples, pending.flops)
        self.last_read_step = number
        self._check_finite(pending, values)
        self._check_spike(pending, values)
        if number % self.config.train.log_every and number != self.config.train.steps:
            return
        values |= self.stopwatch.lap()
        devices = list(self.setup.mesh.devices.flat)
        values["save_stall_s"] = self.save_stall_s
        self.save_stall_s = 0.0
        values["mfu"] = model_flops_utilisation(self.config, values["model_tflops_per_s"], devices)
        input_values, advice = self.input_monitor.lap(values["step_time_s"], values["data_wait_fraction"])
        epochs = {f"epochs/{name}": passes for name, passes in self.sampler.epochs(pending.batch + 1).items()}
        counts = self.counter.lap(pending.counts)
        self.writer.write(number, values | input_values | counts | epochs)
        self.events.write("progress", number, **self.time_accounting.seconds())
        bad = {name.removeprefix("bad/"): count for name, count in counts.items() if name.startswith("bad/")}
        if bad:
            self.events.write("bad_data", number, counts=bad)
        log(self.progress_line.text(number, values))
        if advice is not None:
            log(advice)
        self.counter.check(self.config.data.max_bad_fraction)

    # --- anomalies ---------------------------------------------------------------------------------------------------

    def _check_finite(self, pending: _PendingStep, values: Mapping[str, float]) -> None:
        """Records a non-finite step, which has changed no parameter; aborts the run after `guard.max_nonfinite`."""
        self.consecutive_nonfinite = int(values["nonfinite_steps"])
        if not self.consecutive_nonfinite:
            return
        number, limit = pending.number, self.config.guard.max_nonfinite
        nonfinite = next(name for name in ("loss", "grad_norm") if not math.isfinite(values[name]))
        first = self.sampler.schedule.first_example(pending.batch)
        record = {"batch": pending.batch, "examples": [first, first + pending.examples], "seed": self.config.seed}
        file = self._record_nonfinite(number, record, values)
        message = f"{nonfinite} is {values[nonfinite]} at step {number}"
        self.events.write("nonfinite", number, loss=values["loss"], grad_norm=values["grad_norm"], file=file)
        if self.consecutive_nonfinite < limit:
            see = "" if file is None else f"; see {file}"
            log(f"{message}: its update is skipped ({self.consecutive_nonfinite} in a row, {limit} end the run){see}")
            return
        raise TrainingAborted(
            f"{message}, the last of {self.consecutive_nonfinite} non-finite steps in a row, the limit of "
            f"guard.max_nonfinite. Their updates were skipped; {self._newest_checkpoint()}. "
            f"To look into it, run the same command with --replay {number}"
        )

    def _record_nonfinite(self, number: int, record: Mapping[str, Any], values: Mapping[str, float]) -> str | None:
        """Writes the record that a replay compares with, on process 0; returns its path if it could be written."""
        if jax.process_index() != 0:
            return None
        try:
            return write_record(self.workdir, number, record, values)
        except Exception as error:  # OSError, or for a bucket an error class of TensorFlow or fsspec.
            log(f"the record of step {number} could not be written: {error}")
            return None

    def _newest_checkpoint(self) -> str:
        """A clause for error messages that names the newest checkpoint."""
        # A failed save raises UserError here; the caller's own message ends the run.
        with contextlib.suppress(UserError), self.watchdog.watching("save"):
            self.checkpointer.wait()  # A save may be in progress.
        latest = self.checkpointer.latest_step()
        return "there is no checkpoint yet" if latest is None else f"the newest checkpoint is that of step {latest}"

    def _check_spike(self, pending: _PendingStep, values: Mapping[str, float]) -> None:
        """Logs a spike and the action taken; raises `Spike` where the run is to be rewound."""
        settings = self.config.guard
        zscores = {name: values[f"{name}_zscore"] for name in ("loss", "grad_norm")}
        if settings.spike == "off" or max(zscores.values()) <= settings.spike_sigma:
            return
        name = max(zscores, key=lambda name: zscores[name])
        number = pending.number
        message = (
            f"{name} is {values[name]:.4g} at step {number}, {zscores[name]:.1f} standard deviations above the mean of "
            "the steps before"
        )
        self.events.write("spike", number, values={name: values[name] for name in zscores}, action=settings.spike)
        if settings.spike == "rewind":
            raise Spike(number, pending.batch, message)
        log(f"spike: {message}" + ("; its update is skipped" if values["skipped"] else ""))

    def _rewind(self, spike: Spike, progress: TrainProgress) -> tuple[TrainState, TrainProgress]:
        """Restores a state before a spike; the returned progress skips the batches that led to it."""
        settings = self.config.guard
        attempt = progress.rewinds + 1
        if attempt > settings.max_rewinds:
            raise TrainingAborted(
                f"{spike}; the run was rewound {progress.rewinds} times already, the limit of guard.max_rewinds"
            )
        with self.watchdog.watching("save", spike.step):
            self.checkpointer.settle()
        with self.watchdog.watching("start", spike.step), jax.transfer_guard("allow"):
            saved = self.checkpointer.steps()
            saved = coordination.broadcast(
                f"steps before rewind {attempt}", saved, self.config.processes.barrier_timeout_s
            )
            initial = None if saved else self.initial_state()
            rewind = plan_rewind(spike, saved or [initial[1].step], progress.skips, settings.rewind_batches)
            log(
                f"spike: {spike}; rewinding to step {rewind.step}, skipping batches {rewind.first:,} to "
                f"{rewind.end - 1:,} ({attempt} of {settings.max_rewinds})"
            )
            self.checkpointer.set_aside_newer(rewind.step, "rewound")
            state = initial[0] if initial else self.checkpointer.restore(rewind.step, self.setup.abstract_state)
        self.counter.forget()
        self.events.write("progress", spike.step, **self.time_accounting.seconds())
        self.events.write("rewind", spike.step, from_step=spike.step, to_step=rewind.step, a=rewind.first, b=rewind.end)
        return state, progress.rewound(rewind.step, progress.skips.adding(rewind.first, rewind.end))

    def _check_mismatches(self, number: int, mismatches: Sequence[Mismatch]) -> None:
        """Aborts the run where the SDC check found differing bits."""
        if not mismatches:
            return
        host = os.uname().nodename
        leaves = [f"{mismatch.leaf} in {mismatch.entries} entries" for mismatch in mismatches]
        devices = sorted({device for mismatch in mismatches for device in mismatch.devices})
        self.events.write("corruption", number, leaf=leaves, device=devices, host=host)
        more = f", and {len(leaves) - 1} more leaves" if len(leaves) > 1 else ""
        where = ", ".join(devices) or "none of its devices, but on a device of another host"
        raise TrainingAborted(
            f"step {number}, computed twice, differs: {leaves[0]}{more}, on {host} on {where}; nothing of it is saved, "
            f"{self._newest_checkpoint()}. Exclude that host or device, and start the same command again"
        )

    # --- evaluation --------------------------------------------------------------------------------------------------

    def _evaluate(self, number: int, state: TrainState) -> dict[str, float] | None:
        """The held-out losses of `state`; None where a stop request interrupted the evaluation."""
        config = self.config
        begin_s = time.monotonic()
        self.current_step = number
        put = partial(
            pipeline.to_devices,
            sharding=self.setup.batch_sharding,
            rows=self.eval_rows,
            global_rows=config.eval.batch_size,
        )
        faults: list[pipeline.BadExample] = []
        average = state.average if isinstance(state, AveragedState) else None
        try:
            with self.time_accounting.on("evaluation"), self.watchdog.watching("evaluation", number):
                values = evaluate(self.setup, state.params, self._eval_arrays(faults), put, average)
        except _StopRequested:
            log(f"asked to stop: the evaluation of step {number} is abandoned")
            return None
        names: Sequence[str] = [name for name in ("eval_loss", "eval_loss_ema") if name in values]
        for name in names:
            if not math.isfinite(values[name]):
                raise TrainingAborted(
                    f"{name} is {values[name]} at step {number}; nothing of it is saved, {self._newest_checkpoint()}"
                )
        self.bad_records.write(number, faults)
        self.writer.write(number, values | {"eval_bad_records": len(faults)})
        seconds = round(time.monotonic() - begin_s, 3)
        self.events.write("evaluation", number, seconds=seconds, eval_loss=values[names[-1]])
        losses = "  ".join(f"{name.removeprefix('eval_')} {value:.4f}" for name, value in values.items())
        log(f"step {number:,}  held out: {losses}" + (f"  ({len(faults)} bad records left out)" if faults else ""))
        return values

    def _eval_arrays(self, faults: list[pipeline.BadExample]) -> Iterator[dict[str, np.ndarray]]:
        """This process' rows of the held-out batches; records that cannot be used are added to `faults`.

        Raises:
          _StopRequested: between two batches. All processes have the same number of batches.
        """
        for _, host in pipeline.evaluation_batches(self.config, self.eval_rows, self.tokenizer):
            if self.preemption.reached():
                raise _StopRequested
            faults += host.faults
            yield {name: array for name, array in host.arrays.items() if name not in pipeline.BOOKKEEPING}


def log(text: str) -> None:
    """Prints a line to the console, on process 0 only."""
    if jax.process_index() == 0:
        print_line(text)


def _every(interval: int, number: int) -> bool:
    return interval > 0 and number % interval == 0
