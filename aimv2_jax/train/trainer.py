"""Set-up and tear-down of a training run: where it starts, and how it ends. The loop itself: loop.py.

Decisions that depend on the contents of the workdir are made by process 0 for all (`coordination.broadcast`).
"""

from __future__ import annotations

import contextlib
import platform
import secrets
import time
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import jax
from etils import epath

from aimv2_jax.checkpoint.checkpointer import Checkpointer, CheckpointReader, check_free_space, state_bytes
from aimv2_jax.config.load import config_digest, config_text
from aimv2_jax.config.schema import Config
from aimv2_jax.data import pipeline
from aimv2_jax.data.identity import TOKENIZER
from aimv2_jax.data.sampling.skips import with_examples
from aimv2_jax.data.tokenizer import Tokenizer
from aimv2_jax.distributed import coordination
from aimv2_jax.errors import EXIT_BUG, EXIT_FINISHED, StorageError, UserError, describe_exit
from aimv2_jax.models.aimv2 import count_parameters
from aimv2_jax.monitoring.counters import BadRecordFile
from aimv2_jax.monitoring.events import Event, EventKind, EventLog, process_age_s
from aimv2_jax.monitoring.log import logger
from aimv2_jax.monitoring.metrics import MetricsWriter
from aimv2_jax.monitoring.profiler import Profiler
from aimv2_jax.parallel.mesh import spans_islands
from aimv2_jax.resilience import device_errors
from aimv2_jax.resilience.progress import TrainProgress
from aimv2_jax.resilience.repeated_failures import FOLDER
from aimv2_jax.resilience.watchdog import Hang, Watchdog, register_dump_signal
from aimv2_jax.storage.files import atomic_write, is_remote, is_temporary, make_folder, remove
from aimv2_jax.storage.locks import lock_folder
from aimv2_jax.train.builder import TrainSetup, build_setup
from aimv2_jax.train.data_check import check_data, identify_data
from aimv2_jax.train.device_memory import check_device_memory
from aimv2_jax.train.distill_task import TEACHER
from aimv2_jax.train.init_from import RunWeights, WeightSource, check_teacher, read_teacher, warm_start
from aimv2_jax.train.loop import TrainLoop
from aimv2_jax.train.optimizer import decay_report
from aimv2_jax.train.resources import Resources
from aimv2_jax.train.resume import check_resumable, check_trunk
from aimv2_jax.train.step import TrainState
from aimv2_jax.train.task import merge
from aimv2_jax.untrusted import printable
from aimv2_jax.version import installed_versions

_LOCK = "lock"
_MAX_CLOCK_SKEW_S = 2.0


def train(
    config: Config,
    workdir: epath.PathLike,
    tokenizer: Tokenizer,
    open_weights: Callable[[], WeightSource] | None = None,
    skip_examples: tuple[int, int] | None = None,
    accept_data: str | None = None,
    sources: pipeline.Sources | None = None,
    open_teacher: Callable[[], WeightSource] | None = None,
) -> int:
    """Trains until `train.steps`, from the newest intact checkpoint of `workdir` where there is one.

    Without a checkpoint, a cooldown (`train.cooldown_from`) starts from that step of its trunk, a run with `init.path`
    from the parameters of the source that `open_weights` returns (by default another run at that path), and any other
    run from fresh parameters; a distillation also reads its teacher from the source that `open_teacher` returns (by
    default another run at `distill.path`). Batches with any of the examples [a, b) of `skip_examples` are skipped. Data
    and tokenizer must be those of the checkpoint, unless `accept_data` is the digest of the current ones. `sources` are
    the config's; by default they are opened here.

    Returns:
      The exit code: EXIT_FINISHED, or EXIT_RETRY where the run was asked to stop before and has saved its last step.

    Raises:
      UserError: before anything compiles, for whatever cannot work; later, when a checkpoint cannot be written.
      TrainingAborted: on non-finite losses or gradients, on repeated spikes, on too many bad records, and on a step
        that differs when it is computed twice.
    """
    sources = sources or pipeline.open_sources(config)
    workdir = epath.Path(workdir)
    cache = cache_folder(config.train.compilation_cache, workdir, jax.default_backend())
    if cache is not None:
        _use_compilation_cache(cache)
    setup = build_setup(config)
    check_device_memory(setup)
    size = state_bytes(setup.abstract_state)
    timeout_s = config.processes.barrier_timeout_s
    with contextlib.ExitStack() as stack:
        if jax.process_index() == 0:
            stack.enter_context(lock_workdir(workdir))
        # No process touches the workdir before process 0 has locked it.
        coordination.broadcast("lock of the workdir", True, timeout_s)
        if not is_remote(workdir) and not (workdir / _LOCK).exists():
            remedy = "Give a folder on a disk that all hosts share, or gs://BUCKET/FOLDER"
            raise UserError("--workdir is another folder here than on process 0's host", str(workdir), remedy)
        events = stack.enter_context(EventLog(workdir, process_age_s()))
        _check_clock(events)
        watchdog = stack.enter_context(_start_watchdog(workdir, config, events))
        starting = stack.enter_context(contextlib.ExitStack())
        starting.enter_context(watchdog.watching("start", 0))
        data = identify_data(config, sources, tokenizer)
        checkpointer = Checkpointer(workdir, config.train.keep, config.train.keep_steps)
        stack.enter_context(_close_watched(checkpointer, watchdog))
        latest = _newest_intact(checkpointer, events)
        if latest is not None:
            check_resumable(checkpointer.meta(latest)["config"], config)
            if latest >= config.train.steps:
                more = "raise train.steps to continue" if config.cooldown is None else "it has cooled down"
                logger.info(f"already finished: {workdir} has step {latest} of {config.train.steps}; {more}")
                return EXIT_FINISHED
        check_free_space(workdir, size)
        writer = MetricsWriter(workdir, config.train.tensorboard, config.train.wandb_project, config)
        resources = Resources(
            workdir=workdir,
            tokenizer=tokenizer,
            sources=sources,
            checkpointer=checkpointer,
            writer=stack.enter_context(writer),
            bad_records=stack.enter_context(BadRecordFile(workdir, jax.process_index())),
            events=events,
            profiler=stack.enter_context(contextlib.closing(Profiler(config.train.profile, workdir))),
            watchdog=watchdog,
            initial_state=partial(initial_state, setup, open_weights, data, open_teacher),
        )
        begin_s = time.monotonic()
        with device_errors.running(lambda: latest or 0, watchdog.failures, events):
            fresh = latest is None
            state, progress = resources.initial_state() if fresh else restore_state(checkpointer, latest, setup)
            restore_s = None if fresh else time.monotonic() - begin_s
            progress = check_data(progress, data, accept_data, events)
            progress = apply_skips(progress, skip_examples, config, sources, events)
            log_summary(setup, workdir, latest, size)
            _log_start(events, setup, progress.step, restore_s)
            if jax.process_index() == 0:
                atomic_write(workdir / "config.txt", config_text(config).encode())
            loop = TrainLoop(setup, resources)
        starting.close()
        with log_stop(events, loop):
            return loop.train(state, progress)


def _start_watchdog(workdir: epath.Path, config: Config, events: EventLog) -> Watchdog:
    """Starts the watchdog; a hang is reported to this process' supervisor and written to the event log."""
    register_dump_signal()
    file = str(workdir / FOLDER)

    def write_events(hang: Hang) -> None:
        events.write(EventKind.HANG, hang.step, what=hang.what, file=file)
        events.write(EventKind.STOP, max(0, hang.step - 1), code=hang.code, why=str(hang))

    return Watchdog(
        workdir,
        jax.process_index(),
        config.watch,
        on_hang=write_events,
        notify=coordination.report_hang,
        channel=coordination.channel(),
    )


@contextlib.contextmanager
def _close_watched(checkpointer: Checkpointer, watchdog: Watchdog) -> Iterator[None]:
    """Waits for the save in progress at the end, also after an error, for as long as a save may take."""
    try:
        yield
    except BaseException:
        checkpointer.stop_hashing()
        raise
    finally:
        with watchdog.watching("save"):
            checkpointer.close()


def _newest_intact(checkpointer: Checkpointer, events: EventLog) -> int | None:
    """The newest verified step; logs the damaged ones."""
    latest, damaged = checkpointer.newest_intact()
    for damage in damaged:
        logger.info(str(damage))
        files = [str(wrong) for wrong in damage.wrong]
        events.write(EventKind.DAMAGED, damage.step, files=files, moved_to=damage.moved_to)
    return latest


def initial_state(
    setup: TrainSetup,
    open_weights: Callable[[], WeightSource] | None,
    data: Mapping[str, Any],
    open_teacher: Callable[[], WeightSource] | None = None,
) -> tuple[TrainState, TrainProgress]:
    """State and progress of a run on `data` without a checkpoint: step 0, or for a cooldown the step of its trunk."""
    cooldown = setup.config.cooldown
    if cooldown is None:
        return _fresh_state(setup, open_weights, open_teacher, data[TOKENIZER]), TrainProgress()
    trunk = CheckpointReader(cooldown.trunk)
    check_trunk(trunk.meta(cooldown.start)["config"], setup.config)
    return restore_state(trunk, cooldown.start, setup)


def restore_state(reader: CheckpointReader, step: int, setup: TrainSetup) -> tuple[TrainState, TrainProgress]:
    """Restores state and progress of a saved step."""
    return reader.restore(step, setup.abstract_state), TrainProgress.from_meta(reader.meta(step))


def apply_skips(
    progress: TrainProgress,
    examples: tuple[int, int] | None,
    config: Config,
    sources: pipeline.Sources,
    events: EventLog,
) -> TrainProgress:
    """Adds the batches with `examples` to those that `progress` skips.

    Raises:
      UserError: where a process has other skips than process 0. Each process parses its own command line.
    """
    if examples is not None:
        steps = pipeline.training_sampler(config, sources.training).schedule
        skips = with_examples(progress.skips, examples, steps, progress.step)
        for first, end in set(skips.ranges) - set(progress.skips.ranges):
            logger.info(f"skipping batches {first:,} to {end - 1:,}, for --skip_examples={examples[0]}:{examples[1]}")
            events.write(EventKind.SKIP, progress.step, a=first, b=end, why="--skip_examples")
        progress = progress.with_skips(skips)
    own = progress.skips.as_json()
    agreed = coordination.broadcast("batches to skip", own, config.processes.barrier_timeout_s)
    if own != agreed:
        raise UserError(
            "--skip_examples differs from that of process 0", examples, "Give all processes of a run the same command"
        )
    return progress


def _check_clock(events: EventLog) -> None:
    ahead_s = events.ahead_s()
    if ahead_s > _MAX_CLOCK_SKEW_S:
        logger.info(
            f"the clock of this machine is {ahead_s:,.0f} s behind the last line of the run's events.jsonl. Only dates "
            "and the time between two starts depend on it. Set the clock"
        )


def _log_start(events: EventLog, setup: TrainSetup, step: int, restore_s: float | None) -> None:
    config, devices = setup.config, setup.mesh.devices
    versions = installed_versions()
    versions["python"] = platform.python_version()
    _log_version_changes(events.last(EventKind.START), versions)
    events.write(
        EventKind.START,
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
        events.write(EventKind.RESTORE, step, seconds=round(restore_s, 3))


def _log_version_changes(before: Event | None, versions: Mapping[str, str]) -> None:
    """Logs the packages whose versions changed since the last start."""
    known = {} if before is None else before.values.get("versions")
    if not isinstance(known, Mapping):  # Another program may have written the event log.
        return
    changes = [f"{name} {now} ({known[name]} before)" for name, now in versions.items() if known.get(name, now) != now]
    if changes:
        logger.info(printable(f"package versions changed since the last start of this run: {', '.join(changes)}"))


@contextlib.contextmanager
def log_stop(events: EventLog, loop: TrainLoop) -> Iterator[None]:
    """Writes a "stop" event with exit code and reason where the run ends with an error."""
    try:
        yield
    except BaseException as error:
        code, reason = describe_exit(error) or (EXIT_BUG, f"{type(error).__name__}: {error}")
        with contextlib.suppress(UserError, StorageError):  # A full disk may be the cause of the error.
            events.write(EventKind.STOP, loop.metrics.last_step, code=code, why=reason)
        raise


def _fresh_state(
    setup: TrainSetup,
    open_weights: Callable[[], WeightSource] | None,
    open_teacher: Callable[[], WeightSource] | None,
    tokenizer: str,
) -> TrainState:
    """The state before step 0, with fresh parameters or those of another model; a distillation's with its teacher."""
    config = setup.config
    teacher = None
    if config.task == "distill":  # Its teacher is opened and checked before anything compiles.
        key = "config distill.path"
        teacher = RunWeights(config.distill.path, key) if open_teacher is None else open_teacher()
        check_teacher(setup, teacher, tokenizer)
    state = setup.init()
    if config.init.path:
        source = RunWeights(config.init.path) if open_weights is None else open_weights()
        own = {name: part for name, part in merge(state.params, state.frozen).items() if name != TEACHER}
        loaded, report = warm_start(setup, own, config.init, source, tokenizer)
        logger.info(report)
        params, frozen = setup.task.split(loaded)
        state = state.replace(params=params, frozen=frozen)
    if teacher is not None:
        params, report = read_teacher(setup, teacher)
        logger.info(report)
        state = state.replace(frozen={TEACHER: params})
    return state


def cache_folder(setting: str | None, workdir: epath.Path, platform: str) -> str | None:
    """Folder of jax's compilation cache, by config train.compilation_cache; None leaves jax's setting as it is."""
    if setting != "workdir":
        return setting
    return None if platform == "cpu" else str(workdir / "compiled")


def _use_compilation_cache(folder: str) -> None:
    jax.config.update("jax_compilation_cache_dir", folder)
    if is_remote(folder):
        # XLA writes its own cache of GPU autotuning by file calls; jax passes it a path made of the bucket's address
        # (jax/_src/compiler.py, `get_compile_options`), which is a folder "gs:" of the working directory.
        jax.config.update("jax_persistent_cache_enable_xla_caches", "none")


@contextlib.contextmanager
def lock_workdir(workdir: epath.Path) -> Iterator[None]:
    """Creates the workdir, and locks it against a second trainer."""
    if is_remote(workdir):
        _check_writable(workdir)
        logger.info(f"workdir {workdir} is in a bucket, which has no locks. Make sure that no other run writes there")
        yield
        return
    make_folder(workdir, "--workdir")
    with lock_folder(Path(workdir) / _LOCK, "--workdir", workdir):
        yield


def _check_writable(workdir: epath.Path) -> None:
    """Writes and deletes an object in a bucket, so that a refusal ends the run before anything compiles."""
    probe = workdir / f"probe-{secrets.token_hex(4)}"
    try:
        atomic_write(probe, b"")
        remove(probe)
    except OSError as error:
        if is_temporary(error):
            raise StorageError(f"--workdir {workdir} cannot be written: {error.strerror}") from error
        remedy = (
            "Create the bucket, or give this machine's account the right to list, read, write and delete objects there"
        )
        raise UserError(f"--workdir {workdir} cannot be used", error.strerror, remedy) from error


def log_summary(setup: TrainSetup, workdir: epath.Path, latest: int | None, size: int) -> None:
    """Logs the decayed tensors, the model's size, the devices and the starting point."""
    state = setup.abstract_state
    params = merge(state.params, state.frozen)
    devices = setup.mesh.devices
    mesh = " x ".join(f"{name} {count}" for name, count in setup.mesh.shape.items())
    logger.info(f"weight decay by tensor:\n{decay_report(state.params)}".rstrip())
    parts = ", ".join(f"{name} {count_parameters(part):,}" for name, part in params.items())
    frozen = f"; frozen: {', '.join(state.frozen)}" if state.frozen else ""
    logger.info(
        f"parameters: {count_parameters(params):,} ({parts}){frozen}; size of a checkpoint: {size / 2**20:,.0f} MiB"
    )
    logger.info(
        f"devices: {devices.size} x {devices.flat[0].device_kind}, mesh {mesh}; {jax.process_count()} process(es)"
    )
    if spans_islands(setup.mesh, "fsdp"):
        logger.info(
            f"mesh.fsdp={setup.mesh.shape['fsdp']} spans GPUs that no NVLink joins: the network carries the weights of "
            "every layer. If a node's memory suffices, set mesh.data=-1 and mesh.fsdp=-1, which keeps fsdp inside it"
        )
    start = "from the start" if latest is None else f"continuing from step {latest}"
    cooldown = setup.config.cooldown
    if cooldown is not None:
        start = f"from step {cooldown.start} of {cooldown.trunk}" if latest is None else start
        start += f", cooling down until step {setup.config.train.steps}"
    logger.info(f"workdir: {workdir}, {start}")
