"""The training loop: the one owner of what changes.

The order of a step is a contract:

1. take the batch of step i (the devices are still busy with step i-1), and hand it to the devices;
2. dispatch step i;
3. only then read the metrics of step i-1, so that the devices never wait for the host; a value that isn't finite ends
   the run here;
4. where step i is due to be evaluated or saved, its own metrics are read first (nothing that isn't finite is ever
   saved), then comes the evaluation, then the save, which records the evaluation of this very state.

A run that is asked to stop (stopping.py) saves step i, the same on all processes, and ends. Whatever is decided here is
decided alike on every process: from the step's number, from values that all have, or by `processes.agree`.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from etils import epath

from aimv2_jax.config import BatchShape, Config, config_text
from aimv2_jax.data import pipeline
from aimv2_jax.data.tokenizer import Tokenizer
from aimv2_jax.errors import EXIT_AGAIN, EXIT_FINISHED, GuardStop, UserError
from aimv2_jax.files import is_remote, write_whole
from aimv2_jax.locks import claimed
from aimv2_jax.models.aimv2 import count_parameters
from aimv2_jax.parallel import processes
from aimv2_jax.parallel.mesh import local_rows
from aimv2_jax.parallel.rules import replicated
from aimv2_jax.train.checkpoint import Checkpointer, CheckpointReader, check_free_space, state_bytes
from aimv2_jax.train.evaluate import evaluate
from aimv2_jax.train.flops import flops_per_example, model_flops_utilisation
from aimv2_jax.train.metrics import MetricsWriter, ProgressLine, Stopwatch
from aimv2_jax.train.optimizer import decay_report
from aimv2_jax.train.profile import Profiler
from aimv2_jax.train.program import Program, build_program
from aimv2_jax.train.resume import check_resumable, check_trunk
from aimv2_jax.train.starvation import FeedWatch
from aimv2_jax.train.step import AveragedState, TrainState
from aimv2_jax.train.stopping import StopRequests
from aimv2_jax.train.tally import BadRecordFile, Tally
from aimv2_jax.train.warm_start import Donor, RunDonor, warm_start

_LOCK = "lock"


def train(
    config: Config, workdir: epath.PathLike, tokenizer: Tokenizer, donor: Callable[[], Donor] | None = None
) -> int:
    """Trains until `train.steps`, from the newest checkpoint of `workdir` where there is one; the exit code.

    Where there is none, a cooldown (`train.cooldown_from`) starts from that step of its trunk, a run with `init.path`
    from the parameters that `donor` opens (by default those of another run there), and any other run anew.

    Returns:
      EXIT_FINISHED, or EXIT_AGAIN where it was asked to stop before, and has saved the step at which it did.

    Raises:
      UserError: before anything compiles, for what cannot work; later, when a checkpoint cannot be written.
      GuardStop: on a loss or gradient that isn't finite, and on too many bad records.
    """
    workdir = epath.Path(workdir)
    cache = cache_folder(config.train.compilation_cache, workdir, jax.default_backend())
    if cache is not None:
        jax.config.update("jax_compilation_cache_dir", cache)
    program = build_program(config)
    size = state_bytes(program.abstract_state)
    timeout_s = config.processes.barrier_timeout_s
    with contextlib.ExitStack() as stack:
        if jax.process_index() == 0:
            stack.enter_context(_claimed(workdir))
        processes.agree("claim of the workdir", True, timeout_s)  # Until it is process 0's, nobody touches it.
        if not is_remote(workdir) and not (workdir / _LOCK).exists():
            remedy = "Give a folder on a disk that all hosts share, or gs://BUCKET/FOLDER"
            raise UserError("--workdir is another folder here than on process 0's host", str(workdir), remedy)
        checkpointer = stack.enter_context(Checkpointer(workdir, config.train.keep, config.train.keep_steps))
        latest = processes.agree("latest step", checkpointer.latest_step(), timeout_s)
        if latest is not None:
            check_resumable(checkpointer.meta(latest)["config"], config)
            if latest >= config.train.steps:
                more = "raise train.steps to go on" if config.cooldown is None else "it has cooled down"
                _say(f"already finished: {workdir} has step {latest} of {config.train.steps}; {more}")
                return EXIT_FINISHED
            origin, start = checkpointer, latest
        elif config.cooldown is not None:
            origin, start = CheckpointReader(config.cooldown.trunk), config.cooldown.start
            check_trunk(origin.meta(start)["config"], config)
        else:
            origin, start = None, 0
        check_free_space(workdir, size)
        writer = stack.enter_context(
            MetricsWriter(workdir, config.train.tensorboard, config.train.wandb_project, config)
        )
        state = _start(program, donor) if origin is None else origin.restore(start, program.abstract_state)
        _introduce(program, workdir, latest, size)
        if jax.process_index() == 0:
            write_whole(workdir / "config.txt", config_text(config).encode())
        writer.cut_after(start)
        bad_records = stack.enter_context(BadRecordFile(workdir, jax.process_index(), start))
        profiler = stack.enter_context(contextlib.closing(Profiler(config.train.profile, workdir)))
        run = _Run(program, tokenizer, checkpointer, writer, bad_records, profiler, start)
        return run.train(state)


def _start(program: Program, donor: Callable[[], Donor] | None) -> TrainState:
    """The state before step 0: fresh, or with the parameters of another model."""
    state, init = program.init(), program.config.init
    if not init.path:
        return state
    opened = RunDonor(init.path) if donor is None else donor()
    params, report = warm_start(program, state.params, init, opened)
    _say(report)
    return state.replace(params=params)


def cache_folder(setting: str | None, workdir: epath.Path, platform: str) -> str | None:
    """Where jax keeps compiled code, by config train.compilation_cache; None: nowhere new."""
    if setting != "workdir":
        return setting
    return None if platform == "cpu" else str(workdir / "compiled")


@contextlib.contextmanager
def _claimed(workdir: epath.Path) -> Iterator[None]:
    """Keeps a second trainer out of the workdir, which is made."""
    if is_remote(workdir):
        try:
            workdir.mkdir(parents=True, exist_ok=True)
        except Exception as error:  # TensorFlow's and fsspec's own kinds.
            remedy = "See that this machine reaches the bucket and may write there, or give another folder"
            raise UserError(f"--workdir {workdir} cannot be used", str(error), remedy) from error
        _say(f"workdir {workdir} is in a bucket, which has no locks: see that no other run writes there")
        yield
        return
    workdir.mkdir(parents=True, exist_ok=True)
    with claimed(Path(workdir) / _LOCK, "--workdir", workdir):
        yield


def _introduce(program: Program, workdir: epath.Path, latest: int | None, size: int) -> None:
    """Says what will be trained, where, and which tensors are decayed."""
    params = program.abstract_state.params
    devices = program.mesh.devices
    mesh = " x ".join(f"{name} {count}" for name, count in program.mesh.shape.items())
    _say(f"weight decay by tensor:\n{decay_report(params)}".rstrip())
    _say(
        f"parameters: {count_parameters(params):,} (encoder {count_parameters(params['encoder']):,}, "
        f"decoder {count_parameters(params['decoder']):,}); a checkpoint takes {size / 2**20:,.0f} MiB"
    )
    _say(f"devices: {devices.size} x {devices.flat[0].device_kind}, mesh {mesh}; {jax.process_count()} process(es)")
    begin = "from the start" if latest is None else f"continuing from step {latest}"
    cooldown = program.config.cooldown
    if cooldown is not None:
        begin = f"from step {cooldown.start} of {cooldown.trunk}" if latest is None else begin
        begin += f", cooling down until step {program.config.train.steps}"
    _say(f"workdir: {workdir}, {begin}")


def _say(text: str) -> None:
    if jax.process_index() == 0:
        print(text, flush=True)


class _Step(NamedTuple):
    """What is done with a batch of one shape: handed to the devices, computed; and the model FLOPs of that."""

    put: Callable[[Mapping[str, np.ndarray]], dict[str, jax.Array]]
    compiled: Callable[..., Any]
    flops: float


class _Pending(NamedTuple):
    """A dispatched step: its number, metrics, the examples and bad records up to it, its own examples and FLOPs."""

    number: int
    metrics: Mapping[str, jax.Array]
    counts: jax.Array
    examples: int
    flops: float


class _Run:
    """What the loop holds while it runs, besides the state."""

    def __init__(
        self,
        program: Program,
        tokenizer: Tokenizer,
        checkpointer: Checkpointer,
        writer: MetricsWriter,
        bad_records: BadRecordFile,
        profiler: Profiler,
        start: int,
    ):
        config = program.config
        self.program, self.config, self.tokenizer = program, config, tokenizer
        self.checkpointer, self.writer, self.start = checkpointer, writer, start
        self.eval_rows = local_rows(program.batch_sharding, config.eval.batch_size)
        self.tally = Tally(list(config.data.sources), pipeline.REASONS, replicated(program.mesh))
        self.bad_records, self.profiler, self.stop = bad_records, profiler, StopRequests()
        self.plan = pipeline.training_plan(config, pipeline.open_sources(config.data.sources))
        self.stopwatch = Stopwatch()
        self.save_stall_s = 0.0  # That steps waited for saves since the last line of metrics.
        self.feed = FeedWatch(
            workers=config.data.workers,
            read_threads=config.data.read_threads,
            prefetch=config.data.prefetch,
            builders=pipeline.builders(config.data.workers),
            cores=pipeline.cores(),
        )
        self.progress = ProgressLine(config.train.steps)

    def train(self, state: TrainState) -> int:
        config = self.config
        rows_of = partial(local_rows, self.program.batch_sharding)
        with pipeline.training_batches(config, rows_of, self.start, self.tokenizer) as batches:
            steps = {shape: self._compile(shape) for shape in config.batch_shapes}
            with jax.transfer_guard("disallow"), self.stop:
                if self.start == 0 and config.train.eval_at_start and config.eval.sources:
                    self._evaluate(0, state)
                stopped = self._steps(steps, state, batches)
                self.checkpointer.wait()
        if stopped is not None:
            _say(
                f"stopped on request: step {stopped} of {config.train.steps} is saved; the same command goes on from it"
            )
            return EXIT_AGAIN
        _say(f"finished: step {config.train.steps}, best checkpoint at step {self.checkpointer.best_step()}")
        return EXIT_FINISHED

    def _compile(self, shape: BatchShape) -> _Step:
        """What to do with batches of `shape`."""
        config, sharding = self.config, self.program.batch_sharding
        what = f" for {shape.examples:,} pictures of {shape.patches:,} patches" if config.data.areas else ""
        _say(f"compiling the train step{what} ...")
        rows = local_rows(sharding, shape.examples)
        put = partial(pipeline.to_devices, sharding=sharding, rows=rows, global_rows=shape.examples)
        return _Step(put, self.program.compile_step(shape), flops_per_example(config, shape.patches) * shape.examples)

    def _steps(self, steps: Mapping[BatchShape, _Step], state: TrainState, batches: pipeline.Batches) -> int | None:
        """The contract at the head of this file; the step at which it was asked to stop, or None."""
        config, program = self.config, self.program
        pending = None  # The step that is dispatched and not yet read.
        self.stopwatch.lap()
        for number in range(self.start + 1, config.train.steps + 1):
            if self.profiler.due(number):
                self._read(pending)
                pending = None
                with self.stopwatch.pause():
                    self.profiler.before(number)
            depth = batches.depth
            with self.stopwatch.waiting():
                host = next(batches)
            assert host.step == number - 1
            if number == self.start + 1:  # The first collective waits less long for others than their workers may need.
                processes.meet("first batch", config.processes.barrier_timeout_s)
            self.feed.add(host.seconds, depth)
            shape = self.plan.steps.shape(host.step)
            step = steps[shape]
            with self.feed.transferring():
                batch = step.put(host.arrays)
            counts = self.tally.add(batch.pop("source"), batch.pop("faults"))
            self.bad_records.write(number, host.faults)
            with jax.profiler.StepTraceAnnotation("train", step_num=number):  # So that XProf knows of steps.
                state, metrics = step.compiled(state, batch, program.rng)
            self._read(pending)
            pending = _Pending(number, metrics, counts, shape.examples, step.flops)
            self.checkpointer.check_errors()
            stopping = self.stop.reached(number) and number < config.train.steps
            evaluating, saving = self._due(number)
            if evaluating or saving or stopping:
                self._read(pending)
                pending = None
                with self.stopwatch.pause():
                    values = self._evaluate(number, state) if evaluating else {}
                    if saving or stopping:
                        # The loss of what `eval/load.py` takes.
                        self._save(number, state, values.get("eval_loss_ema", values.get("eval_loss")))
            if stopping:
                return number
        return None

    def _save(self, number: int, state: TrainState, eval_loss: float | None) -> None:
        """Starts the save of a step, after what was told of the steps before is where it belongs."""
        self.writer.flush()
        self.bad_records.flush()
        start_s = time.perf_counter()
        self.checkpointer.save(number, state, self.config, eval_loss=eval_loss)
        self.save_stall_s += time.perf_counter() - start_s

    def _due(self, number: int) -> tuple[bool, bool]:
        """Whether the state after step `number` is evaluated, and whether it is saved. The last one is both."""
        settings = self.config.train
        last = number == settings.steps
        evaluating = bool(self.config.eval.sources) and (last or _every(settings.eval_every, number))
        return evaluating, last or _every(settings.save_every, number) or number in settings.keep_steps

    def _read(self, pending: _Pending | None) -> None:
        """Waits for a dispatched step; ends the run where its numbers aren't finite; logs it where that is due."""
        if pending is None:
            return
        number = pending.number
        values = {name: float(value) for name, value in jax.device_get(pending.metrics).items()}
        self.stopwatch.count(pending.examples, pending.flops)
        self._check_finite(number, values, ("loss", "grad_norm"))
        if number % self.config.train.log_every and number != self.config.train.steps:
            return
        values |= self.stopwatch.lap()
        devices = list(self.program.mesh.devices.flat)
        values["save_stall_s"], self.save_stall_s = self.save_stall_s, 0.0
        values["mfu"] = model_flops_utilisation(self.config, values["model_tflops_per_s"], devices)
        feed, advice = self.feed.lap(values["step_time_s"], values["data_wait_fraction"])
        epochs = {f"epochs/{name}": passes for name, passes in self.plan.epochs(number).items()}
        self.writer.write(number, values | feed | self.tally.lap(pending.counts) | epochs)
        _say(self.progress.text(number, values))
        if advice is not None:
            _say(advice)
        self.tally.check(self.config.data.max_bad_fraction)

    def _evaluate(self, number: int, state: TrainState) -> dict[str, float]:
        config = self.config
        put = partial(
            pipeline.to_devices,
            sharding=self.program.batch_sharding,
            rows=self.eval_rows,
            global_rows=config.eval.batch_size,
        )
        faults: list[pipeline.Fault] = []
        average = state.average if isinstance(state, AveragedState) else None
        values = evaluate(self.program, state.params, self._eval_arrays(faults), put, average)
        self._check_finite(number, values, [name for name in ("eval_loss", "eval_loss_ema") if name in values])
        self.bad_records.write(number, faults)
        self.writer.write(number, values | {"eval_bad_records": len(faults)})
        told = "  ".join(f"{name.removeprefix('eval_')} {value:.4f}" for name, value in values.items())
        _say(f"step {number:,}  held out: {told}" + (f"  ({len(faults)} bad records left out)" if faults else ""))
        return values

    def _eval_arrays(self, faults: list[pipeline.Fault]) -> Iterator[dict[str, np.ndarray]]:
        """This process' rows of the held-out batches; records that cannot be used are added to `faults`."""
        for _, host in pipeline.evaluation_batches(self.config, self.eval_rows, self.tokenizer):
            faults += host.faults
            yield {name: array for name, array in host.arrays.items() if name not in ("source", "faults")}

    def _check_finite(self, number: int, values: Mapping[str, float], names: Sequence[str]) -> None:
        broken = [name for name in names if not math.isfinite(values[name])]
        if broken:
            self.checkpointer.wait()  # A save may be on its way.
            kept = self.checkpointer.latest_step()
            raise GuardStop(
                f"{broken[0]} is {values[broken[0]]} at step {number}; nothing of it is saved, "
                + ("there is no checkpoint yet" if kept is None else f"the newest checkpoint is that of step {kept}")
            )


def _every(interval: int, number: int) -> bool:
    return interval > 0 and number % interval == 0
