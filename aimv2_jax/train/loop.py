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
import shlex

import jax

from aimv2_jax.config.schema import BatchShape
from aimv2_jax.data import pipeline
from aimv2_jax.distributed import coordination
from aimv2_jax.errors import EXIT_FINISHED, EXIT_RETRY, StorageError
from aimv2_jax.monitoring.events import EventKind, TimeClass
from aimv2_jax.monitoring.log import logger
from aimv2_jax.resilience import device_errors
from aimv2_jax.resilience.preemption import PreemptionHandler
from aimv2_jax.resilience.progress import TrainProgress
from aimv2_jax.resilience.storage_failures import storage_failure
from aimv2_jax.train.builder import TrainSetup
from aimv2_jax.train.compiled_step import CompiledStep, compile_steps
from aimv2_jax.train.evaluate import Evaluator
from aimv2_jax.train.resources import Resources
from aimv2_jax.train.rewind import rewind
from aimv2_jax.train.saving import Saver
from aimv2_jax.train.sdc_check import SdcCheck, abort_on_mismatch
from aimv2_jax.train.step import TrainState
from aimv2_jax.train.step_metrics import Outcome, PendingStep, StepMetrics


class TrainLoop:
    """Runs the steps of a run: `setup` is its config on its mesh, `resources` its files, logs and threads."""

    def __init__(self, setup: TrainSetup, resources: Resources):
        self.setup = setup
        self.config = setup.config
        self.resources = resources
        self.watchdog = resources.watchdog
        self.preemption = PreemptionHandler()
        self.sampler = pipeline.training_sampler(self.config, resources.sources.training)
        self.saver = Saver(self.config, resources)
        self.metrics = StepMetrics(setup, resources, self.sampler, self.saver)
        self.evaluator = Evaluator(setup, resources, self.preemption.reached)
        self.programs: dict[BatchShape, CompiledStep] = {}
        self.sdc_check: SdcCheck | None = None
        # Holds the signal handlers, and the watch on the end of a run that was asked to stop.
        self.exit_stack = contextlib.ExitStack()
        # Whether the barrier on the first batch has passed; once in the life of a process.
        self.first_batch_synced = False
        self.current_step = 0  # The step that is being dispatched, waited for, or evaluated.
        self.last_step_unevaluated = False  # Whether a stop request came during the evaluation of the last step.

    def train(self, state: TrainState, progress: TrainProgress) -> int:
        """Trains to the last step, or until it is asked to stop; returns the exit code."""
        self.current_step = progress.step
        running = device_errors.running(lambda: self.current_step, self.watchdog.failures, self.resources.events)
        with jax.transfer_guard("disallow"), running, self.exit_stack:
            self.exit_stack.callback(self.resources.bad_records.flush)
            while (outcome := self._train_from(state, progress)) is Outcome.REWIND:
                state, progress = rewind(self.metrics.spike, progress, self.setup, self.resources)
                self.metrics.counter.forget()
        return self._end(outcome)

    def _train_from(self, state: TrainState, progress: TrainProgress) -> Outcome:
        """Trains from `progress.step` on."""
        self.current_step = progress.step
        self.metrics.begin(progress.step)
        self.resources.writer.cut_after(progress.step)
        self.resources.bad_records.cut_after(progress.step)
        with self._batches(progress) as batches:
            self._compile()
            if progress.step == 0 and self.config.train.eval_at_start and self.config.eval.sources:
                self.evaluator.evaluate(0, state)
            outcome = self._run_steps(state, progress, batches)
            if outcome is not Outcome.REWIND:
                self.saver.wait(self.metrics.last_step)
        return outcome

    def _run_steps(self, state: TrainState, progress: TrainProgress, batches: pipeline.BatchIterator) -> Outcome:
        """Runs the contract at the head of this file."""
        last = self.config.train.steps
        profiler = self.resources.profiler
        pending = None  # The step that is dispatched and not yet read.
        self.metrics.stopwatch.lap()
        for number in range(progress.step + 1, last + 1):
            if profiler.due(number):
                if self._read(pending) is Outcome.REWIND:
                    return Outcome.REWIND
                pending = None
                with self.metrics.stopwatch.pause():
                    profiler.before(number)
            host = self._next_batch(batches, number, progress.skips.batch(number - 1))
            state, dispatched = self._dispatch(state, host, number)
            if self._read(pending) is Outcome.REWIND:
                return Outcome.REWIND
            pending = dispatched
            self.saver.check_background(number)
            stopping = self.preemption.reached() and number < last
            evaluating, saving = self._due(number)
            if evaluating or saving or stopping:
                if self._read(pending) is Outcome.REWIND:
                    return Outcome.REWIND
                pending = None
                with self.metrics.stopwatch.pause():
                    values = self.evaluator.evaluate(number, state) if evaluating and not stopping else {}
                    stopping = stopping or (values is None and number < last)
                    if stopping:
                        self.exit_stack.enter_context(self.watchdog.watching("stop", number))
                    # After a non-finite step the save waits for a finite one, unless this is the last step.
                    if stopping or number == last or (saving and not self.metrics.consecutive_nonfinite):
                        self.last_step_unevaluated = values is None and not stopping
                        values = values or {}
                        # `aimv2_jax.pretrained` loads the averaged parameters of a run that has them.
                        eval_loss = values.get("eval_loss_ema", values.get("eval_loss"))
                        self.saver.save(progress.at_step(number), state, eval_loss)
            if stopping:
                return Outcome.STOPPED
        return Outcome.FINISHED

    def _next_batch(self, batches: pipeline.BatchIterator, number: int, batch: int) -> pipeline.HostBatch:
        """Waits for the batch of step `number`, which has index `batch` in the sampler's order."""
        depth = batches.depth
        watching = self.watchdog.watching("data", number, batches.last_read)
        try:
            with self.metrics.stopwatch.waiting(), self.resources.time_accounting.on(TimeClass.DATA), watching:
                host = next(batches)
        except StorageError as error:
            examples = range(*map(self.sampler.schedule.first_example, (batch, batch + 1)))
            sources = self.resources.sources.training.values()
            raise storage_failure(error, sources, number, examples, self.watchdog.failures) from error
        assert host.step == batch
        if not self.first_batch_synced:
            # The first collective has a shorter time-out than the other processes' workers may need.
            coordination.barrier("first batch", self.config.processes.barrier_timeout_s)
            self.first_batch_synced = True
        self.metrics.input_monitor.add(host.seconds, depth)
        return host

    def _dispatch(self, state: TrainState, host: pipeline.HostBatch, number: int) -> tuple[TrainState, PendingStep]:
        """Transfers the batch and dispatches the step; computes it a second time where the SDC check is due."""
        self.current_step = number
        shape = self.sampler.schedule.shape(host.step)
        program = self.programs[shape]
        with self.metrics.input_monitor.transferring(), self.watchdog.watching("step", number):
            batch, bookkeeping = program.transfer(host)
        counts = self.metrics.counter.add(*bookkeeping)
        self.resources.bad_records.write(number, host.faults)
        checked = self.sdc_check is not None and _every(self.config.guard.sdc_check_every, number)
        # The check starts before the step itself, which donates the memory of the state.
        with self.watchdog.watching("step", number):
            repeated = self.sdc_check.start(state, batch, shape) if checked else None
            with jax.profiler.StepTraceAnnotation("train", step_num=number):  # Marks the step for XProf.
                state, metrics = program.run(state, batch, self.setup.rng)
            mismatches = self.sdc_check.differences((state, metrics), repeated) if checked else []
        abort_on_mismatch(number, mismatches, self.resources)
        return state, PendingStep(number, host.step, metrics, counts, program)

    def _read(self, pending: PendingStep | None) -> Outcome:
        """Reads the metrics of a dispatched step, if there is one."""
        if pending is None:
            return Outcome.CONTINUE
        self.current_step = pending.number
        return self.metrics.read(pending)

    def _due(self, number: int) -> tuple[bool, bool]:
        """Whether the state after step `number` is evaluated, and whether it is saved; the last one is both."""
        settings = self.config.train
        last = number == settings.steps
        evaluating = bool(self.config.eval.sources) and (last or _every(settings.eval_every, number))
        scheduled = last or _every(settings.save_every, number) or number in settings.keep_steps
        return evaluating, scheduled or self.saver.must_save

    def _batches(self, progress: TrainProgress) -> pipeline.BatchIterator:
        """The batches from `progress` on; workers that stall for half of `watch.data_s` are restarted."""
        config = self.config

        def log_restart(failure: pipeline.WorkerFailure) -> None:
            step = self.metrics.last_step
            self.resources.events.write(EventKind.WORKER_RESTARTED, step, what=failure.what, at=failure.at)

        return pipeline.training_batches(
            config,
            self.setup.local_rows,
            progress.step,
            self.resources.tokenizer,
            progress.skips,
            stall_s=config.watch.data_s / 2,
            on_restart=log_restart,
            sources=self.resources.sources.training,
        )

    def _compile(self) -> None:
        """Compiles the train step for all batch shapes, once, and the SDC check's step where there is one.

        Installs the signal handlers afterwards: before, there is nothing to save, and a SIGTERM ends the process at
        once.
        """
        if self.programs:
            return
        guard = self.config.guard
        with jax.transfer_guard("allow"), device_errors.compiling():
            self.programs = compile_steps(self.setup, self.resources.events, self.metrics.last_step)
            if guard.sdc_check_every:
                logger.info("compiling the step of the SDC check ...")
                steps = {shape: program.run for shape, program in self.programs.items()}
                self.sdc_check = SdcCheck(self.setup, steps, guard.sdc_rotate_devices)
        self.resources.time_accounting.restart()
        self.exit_stack.enter_context(self.preemption)

    def _end(self, outcome: Outcome) -> int:
        """Logs how the run ended; returns the exit code."""
        events = self.resources.events
        steps = self.config.train.steps
        if outcome is Outcome.STOPPED:
            self.resources.checkpointer.stop_hashing()
            step = self.current_step
            logger.info(f"stopped on request: step {step} of {steps} is saved; the same command continues from it")
            events.write(EventKind.PROGRESS, step, **self.resources.time_accounting.seconds())
            events.write(EventKind.PREEMPTION, step)
            events.write(EventKind.STOP, step, code=EXIT_RETRY, why="asked to stop")
            return EXIT_RETRY
        reason = "finished"
        message = f"finished: step {steps}, best checkpoint at step {self.resources.checkpointer.best_step()}"
        if self.last_step_unevaluated:
            reason += ", and asked to stop before the last step was evaluated"
            checkpoint = shlex.quote(f"{self.resources.workdir}:{steps}")
            command = f"python -m aimv2_jax.eval.heldout --checkpoint={checkpoint}"
            message += f"; step {steps} is not evaluated, since the run was asked to stop. To evaluate it: {command}"
        logger.info(message)
        events.write(EventKind.STOP, steps, code=EXIT_FINISHED, why=reason)
        return EXIT_FINISHED


def _every(interval: int, number: int) -> bool:
    return interval > 0 and number % interval == 0
