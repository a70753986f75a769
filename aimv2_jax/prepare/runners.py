"""Runners of tasks: this process, a pool of processes, or Apache Beam."""

from __future__ import annotations

import contextlib
import io
import itertools
import logging
import multiprocessing
import shlex
import signal
import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from typing import Any, Protocol

from tqdm import tqdm

from aimv2_jax.data.loading.workers import start_worker
from aimv2_jax.errors import StorageError, UserError
from aimv2_jax.prepare.output import RESUME_HINT, OutputFolder, TaskResult
from aimv2_jax.prepare.tasks import Task

_MAX_MESSAGE_LENGTH = 200  # Characters of a message from Beam.
_TASKS_PER_WORKER = 2  # Submitted tasks per worker, so that no worker waits for its next task.


class Job(Protocol):
    """What all tasks of a run share, and what is done with each."""

    output: str

    def run(self, task: Task) -> TaskResult:
        """Runs a task and writes its result to the output folder."""


Runner = Callable[[Sequence[Task], Job], None]
"""Runs all tasks, or raises."""


def run_local(tasks: Sequence[Task], job: Job, workers: int = 1) -> None:
    """Runs `tasks` in `workers` processes, or in this one if `workers` is 1, with a progress bar in bytes of input."""
    workers = min(workers, len(tasks))
    total = sum(task.num_bytes for task in tasks)
    with tqdm(total=total, unit="B", unit_scale=True, desc="preparing", disable=None) as bar:
        records = samples = 0
        for task, (kept, seen) in _in_turn(tasks, job) if workers <= 1 else _in_pool(tasks, job, workers):
            records, samples = records + kept, samples + seen
            bar.set_postfix_str(f"{records:,} of {samples:,} samples kept", refresh=False)
            bar.update(task.num_bytes)


def _run_counted(task: Task, job: Job) -> tuple[int, int]:
    stats = job.run(task).stats
    return stats.records, stats.samples


def _in_turn(tasks: Sequence[Task], job: Job) -> Iterator[tuple[Task, tuple[int, int]]]:
    for task in tasks:
        yield task, _run_counted(task, job)


def _in_pool(tasks: Sequence[Task], job: Job, workers: int) -> Iterator[tuple[Task, tuple[int, int]]]:
    others = set(multiprocessing.active_children())
    context = multiprocessing.get_context("spawn")
    waiting = iter(tasks)
    running: dict[Future[tuple[int, int]], Task] = {}
    pool = ProcessPoolExecutor(workers, context, start_worker)
    try:
        while True:
            for task in itertools.islice(waiting, _TASKS_PER_WORKER * workers - len(running)):
                with _no_interrupt():
                    running[pool.submit(_run_counted, task, job)] = task
            if not running:
                return
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                counts = future.result()
                yield running.pop(future), counts
    except BrokenProcessPool as error:
        at_work = sorted(running.values(), key=lambda task: task.number)[:workers]
        remedy = f"If the memory was full, give fewer --workers; {RESUME_HINT}"
        what = "a worker process died while preparing one of these inputs"
        raise UserError(what, "; ".join(map(_inputs, at_work)), remedy) from error
    finally:
        if running:  # After an error or Ctrl-C: waiting for the running tasks would take minutes.
            for child in set(multiprocessing.active_children()) - others:
                child.terminate()
        pool.shutdown(cancel_futures=True)


def _inputs(task: Task) -> str:
    first, last = task.shards[0].path, task.shards[-1].path
    return first if first == last else f"{first} to {last}"


@contextlib.contextmanager
def _no_interrupt() -> Iterator[None]:
    """Blocks SIGINT; processes started inside inherit that, so Ctrl-C reaches only this process."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def beam_pipeline(options: str) -> Any:
    """Creates an empty Apache Beam pipeline with the options of `--beam-options`.

    Raises:
      UserError: if Beam is not installed, or the options are wrong.
    """
    complaints = io.StringIO()  # Captures Beam's usage message, which is a page long.
    logging.disable(logging.WARNING)  # Beam warns about missing Google packages, which few runners need.
    try:
        import apache_beam as beam
        from apache_beam.options.pipeline_options import PipelineOptions

        with contextlib.redirect_stderr(complaints), contextlib.redirect_stdout(complaints):
            # Without a list of flags, Beam would parse this program's own command line.
            parsed = PipelineOptions(shlex.split(options))
            parsed.get_all_options()  # Raises for wrong values now instead of when the pipeline runs.
            return beam.Pipeline(options=parsed)
    except ImportError as error:
        remedy = "Install it: pip install aimv2_jax[beam]"
        raise UserError("--runner beam needs Apache Beam", str(error), remedy) from error
    except (ValueError, SystemExit) as error:
        why = complaints.getvalue().strip().rpartition("error: ")[2] if isinstance(error, SystemExit) else str(error)
        remedy = "Give valid options of a Beam pipeline"
        raise UserError(f"--beam-options cannot be used ({_line(why)})", options, remedy) from error
    finally:
        logging.disable(logging.NOTSET)


def run_beam(tasks: Sequence[Task], job: Job, pipeline: Any) -> None:
    """Runs `tasks` in a `beam_pipeline`, whose workers read them from the output folder.

    Raises:
      UserError: if Beam's runner cannot be started, or a task raised a user error.
      StorageError: if a bucket failed in a task, and may work later.
    """
    import apache_beam as beam

    todo = frozenset(task.number for task in tasks)
    output = OutputFolder(job.output)
    try:
        with _temporary_files(), pipeline:
            _ = (
                pipeline
                # The job contains only the folder's name, because runners do not accept a list of 200,000 inputs.
                | beam.Create([job.output])
                | beam.FlatMap(_tasks)
                | beam.Filter(lambda task: task.number in todo)
                | beam.Reshuffle()
                | beam.Map(partial(_run_recording_errors, job=job))
            )
    except Exception as error:
        if str(error).startswith("KeyboardInterrupt"):  # The DirectRunner converts an interrupt of a task to an error.
            raise KeyboardInterrupt from error
        if failure := output.failure():
            raise failure from error
        if "[while running" in str(error):  # A task failed with a bug of this package.
            raise
        remedy = f"Check the runner that --beam-options names, {RESUME_HINT}"
        raise UserError(f"Beam could not run ({_line(str(error))})", type(pipeline.runner).__name__, remedy) from error
    if failure := output.failure():
        raise failure


def _line(text: str) -> str:
    """First characters of a message, on one line."""
    return " ".join(text.split())[:_MAX_MESSAGE_LENGTH]


@contextlib.contextmanager
def _temporary_files() -> Iterator[None]:
    """Redirects temporary files to a folder that is removed at the end, because Beam leaves its files behind."""
    before = tempfile.tempdir
    with tempfile.TemporaryDirectory(prefix="prepare-", ignore_cleanup_errors=True) as folder:
        tempfile.tempdir = folder
        try:
            yield
        finally:
            tempfile.tempdir = before


def _tasks(output: str) -> Iterator[Task]:
    return OutputFolder(output).tasks()


def _run_recording_errors(task: Task, job: Job) -> None:
    """Runs a task and writes its error to the output folder: Beam turns exceptions into text of many lines.

    An error of storage is also raised, so that runners that retry failed work do so.
    """
    try:
        job.run(task)
    except (UserError, StorageError) as error:
        with contextlib.suppress(OSError):  # The same bucket failed again; `error` already reports it.
            OutputFolder(job.output).fail_task(task, error)
        if isinstance(error, StorageError):
            raise
