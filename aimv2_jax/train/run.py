"""The training loop: the one owner of what changes.

The order of a step is a contract:

1. take the batch of step i (the devices are still busy with step i-1), and hand it to the devices;
2. dispatch step i;
3. only then read the metrics of step i-1, so that the devices never wait for the host; here it is seen whether its
   numbers were finite, and no spike;
4. where step i is due to be evaluated or saved, its own metrics are read first, then comes the evaluation, then the
   save, which records the evaluation of this very state. A save that failed makes the next step due. No step is saved
   that was not finite, the last one and one that a request to stop ends with apart: their states are those of the steps
   before.

A run that is asked to stop (stopping.py) saves step i, the same on all processes, and ends; an evaluation that is going
on is given up. A spike may send it back (rewind.py). Whatever is decided here is decided alike on every process: from
the step's number, from values that all have, or by `processes.agree`.
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

from aimv2_jax.config import BatchShape
from aimv2_jax.console import print_line
from aimv2_jax.data import pipeline
from aimv2_jax.data.tokenizer import Tokenizer
from aimv2_jax.errors import EXIT_AGAIN, EXIT_FINISHED, GuardStop, StorageError, UserError
from aimv2_jax.parallel import processes
from aimv2_jax.parallel.mesh import local_rows
from aimv2_jax.parallel.rules import replicated
from aimv2_jax.train import device_errors
from aimv2_jax.train.checkpoint import Checkpointer
from aimv2_jax.train.course import Course
from aimv2_jax.train.evaluate import evaluate
from aimv2_jax.train.events import Events, Spending
from aimv2_jax.train.flops import flops_per_example, model_flops_utilisation
from aimv2_jax.train.metrics import MetricsWriter, ProgressLine, Stopwatch
from aimv2_jax.train.nonfinite import write_record
from aimv2_jax.train.profile import Profiler
from aimv2_jax.train.program import Program
from aimv2_jax.train.recompute import Difference, Recompute
from aimv2_jax.train.rewind import Spike, plan_rewind
from aimv2_jax.train.starvation import FeedWatch
from aimv2_jax.train.step import AveragedState, TrainState
from aimv2_jax.train.stopping import StopRequests
from aimv2_jax.train.storage_failures import storage_failure
from aimv2_jax.train.tally import BadRecordFile, Tally
from aimv2_jax.train.watchdog import Watchdog


class _Step(NamedTuple):
    """What is done with a batch of one shape: handed to the devices, computed; and the model FLOPs of that."""

    put: Callable[[Mapping[str, np.ndarray]], dict[str, jax.Array]]
    compiled: Callable[..., Any]
    flops: float


class _Pending(NamedTuple):
    """A dispatched step: number, batch, metrics, the examples and bad records up to it, its own examples and FLOPs."""

    number: int
    batch: int
    metrics: Mapping[str, jax.Array]
    counts: jax.Array
    examples: int
    flops: float


class _StopRequested(Exception):
    """The run was asked to stop while it was evaluating."""


class Run:
    """What the loop holds while it runs, besides the state.

    Args:
      begin: where the run begins that has no checkpoint.
    """

    def __init__(
        self,
        program: Program,
        workdir: epath.Path,
        tokenizer: Tokenizer,
        checkpointer: Checkpointer,
        writer: MetricsWriter,
        events: Events,
        profiler: Profiler,
        watchdog: Watchdog,
        begin: Callable[[], tuple[TrainState, Course]],
    ):
        config = program.config
        self.program, self.config, self.workdir, self.tokenizer = program, config, workdir, tokenizer
        self.checkpointer, self.writer, self.events, self.begin = checkpointer, writer, events, begin
        # The batch size of an evaluation that there is not need not fit the devices.
        self.eval_rows = local_rows(program.batch_sharding, config.eval.batch_size) if config.eval.sources else range(0)
        self.tally = Tally(list(config.data.sources), pipeline.REASONS, replicated(program.mesh))
        self.profiler, self.watchdog, self.stop = profiler, watchdog, StopRequests()
        self.plan = pipeline.training_plan(config, pipeline.open_sources(config.data.sources))
        self.compiled: dict[BatchShape, _Step] = {}
        self.recompute: Recompute | None = None
        self.stopwatch, self.spending = Stopwatch(), Spending()
        self.save_stall_s = 0.0  # That steps waited for saves since the last line of metrics.
        self.feed = FeedWatch(
            workers=config.data.workers,
            read_threads=config.data.read_threads,
            prefetch=config.data.prefetch,
            builders=pipeline.builders(config.data.workers),
            cores=pipeline.cores(),
        )
        self.progress = ProgressLine(config.train.steps)
        self.ending = contextlib.ExitStack()  # Signals listened to; the end of a run that was asked to stop, watched.
        self.met_first_batch = False  # Whether all processes had a first batch, once in the life of a process.
        self.first_step = 0  # The step whose state the process began with.
        self.current_step = 0  # The step that is being dispatched, waited for, or evaluated.
        self.done = 0  # Steps, as far as they were read.
        self.nonfinite = 0  # Of them the last ones, in a row, that were not finite.
        self.owes_save = False  # One that failed is to be made up for, at the next step that can be saved.
        self.unevaluated = False  # Whether a request to stop came during the evaluation of the last step.

    def train(self, state: TrainState, course: Course) -> int:
        """Trains on to the last step, or until it is asked to stop; the exit code."""
        self.first_step = self.current_step = course.step
        running = device_errors.running(lambda: self.current_step, self.watchdog.interruptions, self.events)
        with jax.transfer_guard("disallow"), running, self.ending:
            while True:
                spike = None
                try:
                    stopped = self._train_on(state, course)
                    break
                except Spike as error:
                    spike = error.with_traceback(None)  # Whose frames hold on to the state.
                del state
                state, course = self._go_back(spike, course)
        steps = self.config.train.steps
        if stopped is not None:
            say(f"stopped on request: step {stopped} of {steps} is saved; the same command goes on from it")
            self.events.write("progress", stopped, **self.spending.seconds())
            self.events.write("preemption", stopped)
            self.events.write("stop", stopped, code=EXIT_AGAIN, why="asked to stop")
            return EXIT_AGAIN
        why, told = "finished", f"finished: step {steps}, best checkpoint at step {self.checkpointer.best_step()}"
        if self.unevaluated:
            why += ", and asked to stop before the last step was evaluated"
            command = f"python -m aimv2_jax.eval.heldout --checkpoint={shlex.quote(f'{self.workdir}:{steps}')}"
            told += f"; step {steps} is not evaluated, since the run was asked to stop: {command} does that"
        say(told)
        self.events.write("stop", steps, code=EXIT_FINISHED, why=why)
        return EXIT_FINISHED

    def _train_on(self, state: TrainState, course: Course) -> int | None:
        """Trains on from where the course is; the step at which it was asked to stop, or None."""
        config = self.config
        self.done, self.nonfinite = course.step, 0
        self.writer.cut_after(course.step)
        with (
            BadRecordFile(self.workdir, jax.process_index(), course.step) as self.bad_records,
            self._batches(course) as batches,
        ):
            self._compile()
            if course.step == 0 and config.train.eval_at_start and config.eval.sources:
                self._evaluate(0, state)
            stopped = self._steps(state, course, batches)
            with self.spending.on("saving"), self.watchdog.watching("save", self.done):
                self.checkpointer.wait()
                self._retire_interruptions()
        return stopped

    def _batches(self, course: Course) -> pipeline.Batches:
        """The batches from where the course is; stalled workers are started again in half the time that ends a run."""
        config, rows_of = self.config, partial(local_rows, self.program.batch_sharding)

        def note(failure: pipeline.Failure) -> None:
            self.events.write("worker_restarted", self.done, what=failure.what, at=failure.at)

        return pipeline.training_batches(
            config, rows_of, course.step, self.tokenizer, course.skips, config.watch.data_s / 2, note
        )

    def _compile(self) -> None:
        """Compiles the train step for all shapes of batches, once; and the one that checks it, where there is.

        From then on signals are listened to: before, there is nothing to save, and a SIGTERM ends the process at once.
        """
        config = self.config
        if self.compiled:
            return
        with jax.transfer_guard("allow"), device_errors.compiling():
            for shape in config.batch_shapes:
                begin_s = time.monotonic()
                self.compiled[shape] = self._compiled_for(shape)
                self.events.write("compiled", self.done, seconds=round(time.monotonic() - begin_s, 3))
            if config.guard.recompute_every:
                say("compiling the step that checks it ...")
                steps = {shape: step.compiled for shape, step in self.compiled.items()}
                self.recompute = Recompute(self.program, steps, config.guard.recompute_elsewhere)
        self.spending = Spending()
        self.ending.enter_context(self.stop)

    def _compiled_for(self, shape: BatchShape) -> _Step:
        """What to do with batches of `shape`."""
        config, sharding = self.config, self.program.batch_sharding
        what = f" for {shape.examples:,} pictures of {shape.patches:,} patches" if config.data.areas else ""
        say(f"compiling the train step{what} ...")
        rows = local_rows(sharding, shape.examples)
        put = partial(pipeline.to_devices, sharding=sharding, rows=rows, global_rows=shape.examples)
        return _Step(put, self.program.compile_step(shape), flops_per_example(config, shape.patches) * shape.examples)

    def _steps(self, state: TrainState, course: Course, batches: pipeline.Batches) -> int | None:
        """The contract at the head of this file; the step at which it was asked to stop, or None."""
        config, program = self.config, self.program
        pending = None  # The step that is dispatched and not yet read.
        self.stopwatch.lap()
        for number in range(course.step + 1, config.train.steps + 1):
            if self.profiler.due(number):
                self._read(pending)
                pending = None
                with self.stopwatch.pause():
                    self.profiler.before(number)
            depth = batches.depth
            host = self._next_batch(batches, number, course.skips.batch(number - 1))
            if not self.met_first_batch:
                # The first collective waits less long for others than their workers may need.
                processes.meet("first batch", config.processes.barrier_timeout_s)
                self.met_first_batch = True
            self.feed.add(host.seconds, depth)
            shape = self.plan.steps.shape(host.step)
            step = self.compiled[shape]
            self.current_step = number
            with self.feed.transferring(), self.watchdog.watching("step", number):
                batch = step.put(host.arrays)
            counts = self.tally.add(*(batch.pop(name) for name in pipeline.BOOKKEEPING))
            self.bad_records.write(number, host.faults)
            checked = self.recompute is not None and _every(config.guard.recompute_every, number)
            # Before the step itself, which takes over the memory of the state.
            with self.watchdog.watching("step", number):
                again = self.recompute.start(state, batch, shape) if checked else None
                with jax.profiler.StepTraceAnnotation("train", step_num=number):  # So that XProf knows of steps.
                    state, metrics = step.compiled(state, batch, program.rng)
                differences = [] if again is None else self.recompute.differences((state, metrics), again)
                del again
            self._check_same(number, differences)
            self._read(pending)
            pending = _Pending(number, host.step, metrics, counts, shape.examples, step.flops)
            self._check_saved(number)
            stopping = self.stop.reached() and number < config.train.steps
            evaluating, saving = self._due(number)
            saving = saving or self.owes_save
            if evaluating or saving or stopping:
                self._read(pending)
                pending = None
                with self.stopwatch.pause():
                    values = self._evaluate(number, state) if evaluating and not stopping else {}
                    stopping = stopping or (values is None and number < config.train.steps)
                    if stopping:
                        self.ending.enter_context(self.watchdog.watching("stop", number))
                    # A state after steps that were not finite waits for one that is, unless there will be no other.
                    last = stopping or number == config.train.steps
                    if last or (saving and not self.nonfinite):
                        self.unevaluated = values is None and not stopping
                        values = values or {}
                        # The loss of what `eval/load.py` takes.
                        self._save(course.at(number), state, values.get("eval_loss_ema", values.get("eval_loss")))
            if stopping:
                return number
        return None

    def _next_batch(self, batches: pipeline.Batches, number: int, batch: int) -> pipeline.HostBatch:
        """The batch of step `number`, which is number `batch` of the plan."""
        watching = self.watchdog.watching("data", number, batches.last_read)
        try:
            with self.stopwatch.waiting(), self.spending.on("data"), watching:
                host = next(batches)
        except StorageError as error:
            examples = range(*map(self.plan.steps.first_example, (batch, batch + 1)))
            raise storage_failure(error, self.config, number, examples, self.watchdog.interruptions) from error
        assert host.step == batch
        return host

    def _check_saved(self, number: int) -> None:
        """Where a save in the background failed, for the first time, has this step saved instead, or one soon after.

        Several processes do not see that at the same step; there, the next save that is due makes up for it.
        """
        failure, alone = self.checkpointer.check_errors(), jax.process_count() == 1
        if failure is not None:
            when = f"with step {number}, or after it with the first that is finite" if alone else "with the next save"
            self._tell_failure(number, failure, when)
            self.owes_save = alone

    def _tell_failure(self, number: int, failure: UserError, when: str) -> None:
        say(f"{failure} It is tried once more, {when}.")
        self.events.write("save_failed", number, why=str(failure))

    def _save(self, course: Course, state: TrainState, eval_loss: float | None) -> None:
        """Starts the save of a step, after what was told of the steps before is where it belongs."""
        begin_s = time.perf_counter()
        with self.spending.on("saving"), self.watchdog.watching("save", course.step):
            self.writer.flush()
            self.bad_records.flush()
            self.events.flush()
            start_s = time.perf_counter()
            failure = self.checkpointer.save(course.step, state, self.config, eval_loss, course.extra())
            self.owes_save = False
            if failure is not None:
                self._tell_failure(course.step, failure, f"with step {course.step}")
            self._retire_interruptions()
            self.save_stall_s += time.perf_counter() - start_s
        self.events.write("save", course.step, seconds=round(time.perf_counter() - begin_s, 3))

    def _retire_interruptions(self) -> None:
        """Interruptions before a state that was saved since the start do not count any more."""
        saved = self.checkpointer.latest_step()
        if saved is not None and saved > self.first_step:
            self.watchdog.interruptions.retire(saved)

    def _due(self, number: int) -> tuple[bool, bool]:
        """Whether the state after step `number` is evaluated, and whether it is saved. The last one is both."""
        settings = self.config.train
        last = number == settings.steps
        evaluating = bool(self.config.eval.sources) and (last or _every(settings.eval_every, number))
        return evaluating, last or _every(settings.save_every, number) or number in settings.keep_steps

    def _read(self, pending: _Pending | None) -> None:
        """Waits for a dispatched step, looks whether its numbers are good, and logs it where that is due."""
        if pending is None:
            return
        number = self.current_step = pending.number
        with self.watchdog.watching("step", number):
            values = {name: float(value) for name, value in jax.device_get(pending.metrics).items()}
        self.stopwatch.count(pending.examples, pending.flops)
        self.done = number
        self._check_finite(pending, values)
        self._check_spike(pending, values)
        if number % self.config.train.log_every and number != self.config.train.steps:
            return
        values |= self.stopwatch.lap()
        devices = list(self.program.mesh.devices.flat)
        values["save_stall_s"], self.save_stall_s = self.save_stall_s, 0.0
        values["mfu"] = model_flops_utilisation(self.config, values["model_tflops_per_s"], devices)
        feed, advice = self.feed.lap(values["step_time_s"], values["data_wait_fraction"])
        epochs = {f"epochs/{name}": passes for name, passes in self.plan.epochs(pending.batch + 1).items()}
        tally = self.tally.lap(pending.counts)
        self.writer.write(number, values | feed | tally | epochs)
        self.events.write("progress", number, **self.spending.seconds())
        bad = {name.removeprefix("bad/"): count for name, count in tally.items() if name.startswith("bad/")}
        if bad:
            self.events.write("bad_data", number, counts=bad)
        say(self.progress.text(number, values))
        if advice is not None:
            say(advice)
        self.tally.check(self.config.data.max_bad_fraction)

    # --- what guards the run -----------------------------------------------------------------------------------------

    def _check_finite(self, pending: _Pending, values: Mapping[str, float]) -> None:
        """Records a step that was not finite, and has changed nothing; ends the run where it is one too many."""
        self.nonfinite = int(values["nonfinite_steps"])
        if not self.nonfinite:
            return
        number, most = pending.number, self.config.guard.max_nonfinite
        broken = next(name for name in ("loss", "grad_norm") if not math.isfinite(values[name]))
        first = self.plan.steps.first_example(pending.batch)
        record = {"batch": pending.batch, "examples": [first, first + pending.examples], "seed": self.config.seed}
        file = self._record_nonfinite(number, record, values)
        told = f"{broken} is {values[broken]} at step {number}"
        self.events.write("nonfinite", number, loss=values["loss"], grad_norm=values["grad_norm"], file=file)
        if self.nonfinite < most:
            see = "" if file is None else f"; see {file}"
            say(f"{told}, which therefore changed nothing ({self.nonfinite} in a row, {most} end the run){see}")
            return
        raise GuardStop(
            f"{told}, and so in {self.nonfinite} steps in a row, as many as guard.max_nonfinite allows; none of them "
            f"changed anything, {self._newest()}. Look into it by the same command with --replay {number}"
        )

    def _record_nonfinite(self, number: int, record: Mapping[str, Any], values: Mapping[str, float]) -> str | None:
        """Writes the record that a replay compares with, once for all processes; its path, if it could be written."""
        if jax.process_index() != 0:
            return None
        try:
            return write_record(self.workdir, number, record, values)
        except Exception as error:  # OSError, and of a bucket TensorFlow's and fsspec's own kinds.
            say(f"the record of step {number} could not be written: {error}")
            return None

    def _newest(self) -> str:
        """Which checkpoint there is."""
        with contextlib.suppress(UserError), self.watchdog.watching("save"):  # What ends the run is said already.
            self.checkpointer.wait()  # A save may be on its way.
        kept = self.checkpointer.latest_step()
        return "there is no checkpoint yet" if kept is None else f"the newest checkpoint is that of step {kept}"

    def _check_spike(self, pending: _Pending, values: Mapping[str, float]) -> None:
        """Says that a step is a spike, and what is done; raises `Spike` where the run is to go back."""
        settings = self.config.guard
        beyond = {name: values[f"{name}_deviations"] for name in ("loss", "grad_norm")}
        if settings.spike == "off" or max(beyond.values()) <= settings.spike_sigma:
            return
        name = max(beyond, key=lambda name: beyond[name])
        number = pending.number
        told = f"{name} is {values[name]:.4g} at step {number}, {beyond[name]:.1f} deviations above the steps before"
        self.events.write("spike", number, values={name: values[name] for name in beyond}, action=settings.spike)
        if settings.spike == "rewind":
            raise Spike(number, pending.batch, told)
        say(f"a spike: {told}" + ("; its update is left out" if values["skipped"] else ""))

    def _go_back(self, spike: Spike, course: Course) -> tuple[TrainState, Course]:
        """The state before a spike, and the course around the batches that led to it."""
        settings, turn = self.config.guard, course.rewinds + 1
        if turn > settings.max_rewinds:
            raise GuardStop(
                f"{spike}; the run has gone back {course.rewinds} times, as often as guard.max_rewinds allows"
            )
        with self.watchdog.watching("save", spike.step):
            self.checkpointer.settle()
        with self.watchdog.watching("start", spike.step), jax.transfer_guard("allow"):
            saved = self.checkpointer.steps()
            saved = processes.agree(f"steps before rewind {turn}", saved, self.config.processes.barrier_timeout_s)
            begin = None if saved else self.begin()
            back = plan_rewind(spike, saved or [begin[1].step], course.skips, settings.rewind_batches)
            say(
                f"a spike: {spike}; back to step {back.step}, jumping over batches {back.first:,} to {back.end - 1:,} "
                f"({turn} of {settings.max_rewinds})"
            )
            self.checkpointer.set_aside_newer(back.step, "rewound")
            state = begin[0] if begin else self.checkpointer.restore(back.step, self.program.abstract_state)
        self.tally.forget()
        self.events.write("progress", spike.step, **self.spending.seconds())
        self.events.write("rewind", spike.step, from_step=spike.step, to_step=back.step, a=back.first, b=back.end)
        return state, course.rewound(back.step, course.skips.adding(back.first, back.end))

    def _check_same(self, number: int, differences: Sequence[Difference]) -> None:
        """Ends the run where a step that was computed twice came out different."""
        if not differences:
            return
        host = os.uname().nodename
        named = [f"{one.leaf} in {one.entries} entries" for one in differences]
        devices = sorted({device for one in differences for device in one.devices})
        self.events.write("corruption", number, leaf=named, device=devices, host=host)
        more = f", and {len(named) - 1} more leaves" if len(named) > 1 else ""
        where = ", ".join(devices) or "none of its devices, but one of another host's"
        raise GuardStop(
            f"step {number}, computed twice, differs: {named[0]}{more}, on {host} on {where}; nothing of it is saved, "
            f"{self._newest()}. Leave that host or device out, and start again"
        )

    def _evaluate(self, number: int, state: TrainState) -> dict[str, float] | None:
        """The held-out losses of `state`; None where the run was asked to stop meanwhile."""
        config, begin_s = self.config, time.monotonic()
        self.current_step = number
        put = partial(
            pipeline.to_devices,
            sharding=self.program.batch_sharding,
            rows=self.eval_rows,
            global_rows=config.eval.batch_size,
        )
        faults: list[pipeline.Fault] = []
        average = state.average if isinstance(state, AveragedState) else None
        try:
            with self.spending.on("evaluation"), self.watchdog.watching("evaluation", number):
                values = evaluate(self.program, state.params, self._eval_arrays(faults), put, average)
        except _StopRequested:
            say(f"asked to stop: the evaluation of step {number} is given up")
            return None
        names: Sequence[str] = [name for name in ("eval_loss", "eval_loss_ema") if name in values]
        for name in names:
            if not math.isfinite(values[name]):
                raise GuardStop(f"{name} is {values[name]} at step {number}; nothing of it is saved, {self._newest()}")
        self.bad_records.write(number, faults)
        self.writer.write(number, values | {"eval_bad_records": len(faults)})
        seconds = round(time.monotonic() - begin_s, 3)
        self.events.write("evaluation", number, seconds=seconds, eval_loss=values[names[-1]])
        told = "  ".join(f"{name.removeprefix('eval_')} {value:.4f}" for name, value in values.items())
        say(f"step {number:,}  held out: {told}" + (f"  ({len(faults)} bad records left out)" if faults else ""))
        return values

    def _eval_arrays(self, faults: list[pipeline.Fault]) -> Iterator[dict[str, np.ndarray]]:
        """This process' rows of the held-out batches; records that cannot be used are added to `faults`.

        Raises:
          _StopRequested: between two of them, of which all processes have the same number.
        """
        for _, host in pipeline.evaluation_batches(self.config, self.eval_rows, self.tokenizer):
            if self.stop.reached():
                raise _StopRequested
            faults += host.faults
            yield {name: array for name, array in host.arrays.items() if name not in pipeline.BOOKKEEPING}


def say(text: str) -> None:
    """To people, once for all processes."""
    if jax.process_index() == 0:
        print_line(text)


def _every(interval: int, number: int) -> bool:
    return interval > 0 and number % interval == 0
