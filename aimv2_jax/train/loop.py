"""The training loop from outside: where a run starts, and how it ends. What it does in between: run.py.

What is decided here by what lies in the workdir, process 0 decides for all (`processes.agree`).
"""

from __future__ import annotations

import contextlib
import platform
import time
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import jax
from etils import epath

from aimv2_jax.config import Config, config_digest, config_text
from aimv2_jax.data import pipeline
from aimv2_jax.data.identity import TOKENIZER
from aimv2_jax.data.skips import with_examples
from aimv2_jax.data.tokenizer import Tokenizer
from aimv2_jax.errors import EXIT_BUG, EXIT_FINISHED, UserError, last_words
from aimv2_jax.files import is_remote, make_folder, write_whole
from aimv2_jax.locks import claimed
from aimv2_jax.models.aimv2 import count_parameters
from aimv2_jax.parallel import processes
from aimv2_jax.train import device_errors
from aimv2_jax.train.checkpoint import Checkpointer, CheckpointReader, check_free_space, state_bytes
from aimv2_jax.train.course import Course
from aimv2_jax.train.data_check import continue_on, identify_data
from aimv2_jax.train.events import Event, Events, process_age_s
from aimv2_jax.train.interruptions import FOLDER
from aimv2_jax.train.metrics import MetricsWriter
from aimv2_jax.train.optimizer import decay_report
from aimv2_jax.train.profile import Profiler
from aimv2_jax.train.program import Program, build_program
from aimv2_jax.train.resume import check_resumable, check_trunk
from aimv2_jax.train.run import Run, say
from aimv2_jax.train.step import TrainState
from aimv2_jax.train.warm_start import Donor, RunDonor, warm_start
from aimv2_jax.train.watchdog import Hang, Watchdog, register_dump_signal
from aimv2_jax.untrusted import printable
from aimv2_jax.versions import installed_versions

_LOCK = "lock"
_CLOCK_S = 2.0  # By which the clocks of two hosts may differ.


def train(
    config: Config,
    workdir: epath.PathLike,
    tokenizer: Tokenizer,
    donor: Callable[[], Donor] | None = None,
    skip_examples: tuple[int, int] | None = None,
    accept_data: str | None = None,
) -> int:
    """Trains until `train.steps`, from the newest intact checkpoint of `workdir` where there is one; the exit code.

    Where there is none, a cooldown (`train.cooldown_from`) starts from that step of its trunk, a run with `init.path`
    from the parameters that `donor` opens (by default those of another run there), and any other run anew. The batches
    with any of the examples [a, b) of `skip_examples` are jumped over. Data and tokenizer must be those of the
    checkpoint, unless `accept_data` is the digest of the ones that are there now.

    Returns:
      EXIT_FINISHED, or EXIT_AGAIN where it was asked to stop before, and has saved the step at which it did.

    Raises:
      UserError: before anything compiles, for what cannot work; later, when a checkpoint cannot be written.
      GuardStop: on losses or gradients that aren't finite, on spikes that come again and again, on too many bad
        records, and where a step computed twice came out different.
    """
    workdir = epath.Path(workdir)
    cache = cache_folder(config.train.compilation_cache, workdir, jax.default_backend())
    if cache is not None:
        _keep_compiled(cache)
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
        events = stack.enter_context(Events(workdir, process_age_s()))
        _check_clock(events)
        watchdog = stack.enter_context(_watchdog(workdir, config, events))
        starting = stack.enter_context(contextlib.ExitStack())
        starting.enter_context(watchdog.watching("start", 0))
        data = identify_data(config, tokenizer)
        checkpointer = Checkpointer(workdir, config.train.keep, config.train.keep_steps)
        stack.enter_context(_closed_in_time(checkpointer, watchdog))
        latest = _newest_intact(checkpointer, events)
        if latest is not None:
            check_resumable(checkpointer.meta(latest)["config"], config)
            if latest >= config.train.steps:
                more = "raise train.steps to go on" if config.cooldown is None else "it has cooled down"
                say(f"already finished: {workdir} has step {latest} of {config.train.steps}; {more}")
                return EXIT_FINISHED
        check_free_space(workdir, size)
        writer = stack.enter_context(
            MetricsWriter(workdir, config.train.tensorboard, config.train.wandb_project, config)
        )
        profiler = stack.enter_context(contextlib.closing(Profiler(config.train.profile, workdir)))

        begin_s = time.monotonic()
        with device_errors.running(lambda: latest or 0, watchdog.interruptions, events):
            state, course = begin(program, donor, data) if latest is None else _continue(checkpointer, latest, program)
        course = continue_on(course, data, accept_data, events)
        course = _skipping(course, skip_examples, config, events)
        _introduce(program, workdir, latest, size)
        _note_start(events, program, course.step, None if latest is None else time.monotonic() - begin_s)
        if jax.process_index() == 0:
            write_whole(workdir / "config.txt", config_text(config).encode())
        again = partial(begin, program, donor, data)
        run = Run(program, workdir, tokenizer, checkpointer, writer, events, profiler, watchdog, again)
        starting.close()
        with _end_noted(events, run):
            return run.train(state, course)


def _watchdog(workdir: epath.Path, config: Config, events: Events) -> Watchdog:
    """Looks after the run from now on; what hangs is told to the watcher of this process, and to the books."""
    register_dump_signal()
    file = str(workdir / FOLDER)

    def note(hang: Hang) -> None:
        events.write("hang", hang.step, what=hang.what, file=file)
        events.write("stop", max(0, hang.step - 1), code=hang.code, why=str(hang))

    tell, channel = processes.tell_hung, processes.channel()
    return Watchdog(workdir, jax.process_index(), config.watch, on_hang=note, tell=tell, channel=channel)


@contextlib.contextmanager
def _closed_in_time(checkpointer: Checkpointer, watchdog: Watchdog) -> Iterator[None]:
    """The end waits for the save in progress, also where the run ends by an error: as long as a save may take."""
    try:
        yield
    finally:
        with watchdog.watching("save"):
            checkpointer.close()


def _newest_intact(checkpointer: Checkpointer, events: Events) -> int | None:
    """The step to go on from; what is damaged is said."""
    latest, damaged = checkpointer.newest_intact()
    for damage in damaged:
        say(str(damage))
        events.write("damaged", damage.step, files=[str(wrong) for wrong in damage.wrong], moved_to=damage.moved_to)
    return latest


def begin(program: Program, donor: Callable[[], Donor] | None, data: Mapping[str, Any]) -> tuple[TrainState, Course]:
    """Where a run on `data` begins that has no checkpoint: at step 0, or as a cooldown at a step of its trunk."""
    cooldown = program.config.cooldown
    if cooldown is None:
        return _start(program, donor, data[TOKENIZER]), Course()
    trunk = CheckpointReader(cooldown.trunk)
    check_trunk(trunk.meta(cooldown.start)["config"], program.config)
    return _continue(trunk, cooldown.start, program)


def _continue(reader: CheckpointReader, step: int, program: Program) -> tuple[TrainState, Course]:
    return reader.restore(step, program.abstract_state), Course.of_meta(reader.meta(step))


def _skipping(course: Course, examples: tuple[int, int] | None, config: Config, events: Events) -> Course:
    """The course without those examples, too; process 0's word counts, since each process has its own command line."""
    if examples is not None:
        steps = pipeline.training_plan(config, pipeline.open_sources(config.data.sources)).steps
        skips = with_examples(course.skips, examples, steps, course.step)
        for first, end in set(skips.ranges) - set(course.skips.ranges):
            say(f"jumping over batches {first:,} to {end - 1:,}, for --skip_examples={examples[0]}:{examples[1]}")
            events.write("skip", course.step, a=first, b=end, why="--skip_examples")
        course = course.skipping(skips)
    agreed = processes.agree("batches to jump over", course.skips.as_json(), config.processes.barrier_timeout_s)
    if course.skips.as_json() != agreed:
        raise UserError(
            "--skip_examples differs from that of process 0", examples, "Give all processes of a run the same command"
        )
    return course


def _check_clock(events: Events) -> None:
    ahead_s = events.ahead_s()
    if ahead_s > _CLOCK_S:
        say(
            f"the clock of this machine is {ahead_s:,.0f} s behind the last line of the run's events.jsonl: set it "
            "right; nothing but dates and the time between two starts is told by it"
        )


def _note_start(events: Events, program: Program, step: int, restore_s: float | None) -> None:
    config, devices, versions = program.config, program.mesh.devices, installed_versions()
    versions["python"] = platform.python_version()
    _tell_versions(events.last("start"), versions)
    events.write(
        "start",
        step,
        processes=jax.process_count(),
        devices=int(devices.size),
        device_kind=devices.flat[0].device_kind,
        config=config_digest(config),
        steps=config.train.steps,
        save_every=config.train.save_every,
        versions=versions,
    )
    if restore_s is not None:
        events.write("restore", step, seconds=round(restore_s, 3))


def _tell_versions(before: Event | None, versions: Mapping[str, str]) -> None:
    """Says which packages are others than at the start before."""
    known = {} if before is None else before.values.get("versions")
    if not isinstance(known, Mapping):  # Not ours.
        return
    told = [f"{name} {now} ({known[name]} before)" for name, now in versions.items() if known.get(name, now) != now]
    if told:
        say(printable(f"since the last start of this run other versions were installed: {', '.join(told)}"))


@contextlib.contextmanager
def _end_noted(events: Events, run: Run) -> Iterator[None]:
    """Writes into the books how the run ended, if it ends with an error that can be told."""
    try:
        yield
    except BaseException as error:
        code, why = last_words(error) or (EXIT_BUG, f"{type(error).__name__}: {error}")
        with contextlib.suppress(UserError):  # The disk may be what it ended by.
            events.write("stop", run.done, code=code, why=why)
        raise


def _start(program: Program, donor: Callable[[], Donor] | None, tokenizer: str) -> TrainState:
    """The state before step 0: fresh, or with the parameters of another model."""
    state, init = program.init(), program.config.init
    if not init.path:
        return state
    opened = RunDonor(init.path) if donor is None else donor()
    params, report = warm_start(program, state.params, init, opened, tokenizer)
    say(report)
    return state.replace(params=params)


def cache_folder(setting: str | None, workdir: epath.Path, platform: str) -> str | None:
    """Where jax keeps compiled code, by config train.compilation_cache; None: nowhere new."""
    if setting != "workdir":
        return setting
    return None if platform == "cpu" else str(workdir / "compiled")


def _keep_compiled(folder: str) -> None:
    jax.config.update("jax_compilation_cache_dir", folder)
    if is_remote(folder):
        # XLA writes its own cache of GPU autotuning by file calls; jax hands it a path made of the bucket's address
        # (jax/_src/compiler.py, `get_compile_options`), which is a folder "gs:" of the working directory.
        jax.config.update("jax_persistent_cache_enable_xla_caches", "none")


@contextlib.contextmanager
def _claimed(workdir: epath.Path) -> Iterator[None]:
    """Keeps a second trainer out of the workdir, which is made."""
    if is_remote(workdir):
        try:
            workdir.mkdir(parents=True, exist_ok=True)
        except Exception as error:  # TensorFlow's and fsspec's own kinds.
            remedy = "See that this machine reaches the bucket and may write there, or give another folder"
            raise UserError(f"--workdir {workdir} cannot be used", str(error), remedy) from error
        say(f"workdir {workdir} is in a bucket, which has no locks: see that no other run writes there")
        yield
        return
    make_folder(workdir, "--workdir")
    with claimed(Path(workdir) / _LOCK, "--workdir", workdir):
        yield


def _introduce(program: Program, workdir: epath.Path, latest: int | None, size: int) -> None:
    """Says what will be trained, where, and which tensors are decayed."""
    params = program.abstract_state.params
    devices = program.mesh.devices
    mesh = " x ".join(f"{name} {count}" for name, count in program.mesh.shape.items())
    say(f"weight decay by tensor:\n{decay_report(params)}".rstrip())
    say(
        f"parameters: {count_parameters(params):,} (encoder {count_parameters(params['encoder']):,}, "
        f"decoder {count_parameters(params['decoder']):,}); a checkpoint takes {size / 2**20:,.0f} MiB"
    )
    say(f"devices: {devices.size} x {devices.flat[0].device_kind}, mesh {mesh}; {jax.process_count()} process(es)")
    begin = "from the start" if latest is None else f"continuing from step {latest}"
    cooldown = program.config.cooldown
    if cooldown is not None:
        begin = f"from step {cooldown.start} of {cooldown.trunk}" if latest is None else begin
        begin += f", cooling down until step {program.config.train.steps}"
    say(f"workdir: {workdir}, {begin}")
