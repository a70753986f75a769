"""Who does the tasks: this process, a pool of processes, or Apache Beam."""

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
from typing import Any

from tqdm import tqdm

from aimv2_jax.data.preparing.groups import Task
from aimv2_jax.data.preparing.output import BucketError, Output
from aimv2_jax.data.preparing.work import GO_ON, Job, run_task
from aimv2_jax.data.workers import start_worker
from aimv2_jax.errors import UserError

_MOST_LETTERS = 200  # Of Beam's messages.
_AHEAD = 2  # Tasks handed over for each worker: none waits for the next one.


Runner = Callable[[Sequence[Task], Job], None]
"""Does all tasks, or raises."""


def run_local(tasks: Sequence[Task], job: Job, workers: int = 1) -> None:
    """Does `tasks` in `workers` processes, in this one if that is 1, under a progress bar in bytes of input."""
    workers = min(workers, len(tasks))
    total = sum(task.num_bytes for task in tasks)
    with tqdm(total=total, unit="B", unit_scale=True, desc="preparing", disable=None) as bar:
        records = samples = 0
        for task, (kept, seen) in _in_turn(tasks, job) if workers <= 1 else _in_pool(tasks, job, workers):
            records, samples = records + kept, samples + seen
            bar.set_postfix_str(f"{records:,} of {samples:,} samples kept", refresh=False)
            bar.update(task.num_bytes)


def _counted(task: Task, job: Job) -> tuple[int, int]:
    books = run_task(task, job).books
    return books.records, books.samples


def _in_turn(tasks: Sequence[Task], job: Job) -> Iterator[tuple[Task, tuple[int, int]]]:
    for task in tasks:
        yield task, _counted(task, job)


def _in_pool(tasks: Sequence[Task], job: Job, workers: int) -> Iterator[tuple[Task, tuple[int, int]]]:
    others = set(multiprocessing.active_children())
    context = multiprocessing.get_context("spawn")
    waiting = iter(tasks)
    running: dict[Future[tuple[int, int]], Task] = {}
    pool = ProcessPoolExecutor(workers, context, start_worker, (0, workers))
    try:
        while True:
            for task in itertools.islice(waiting, _AHEAD * workers - len(running)):
                with _no_interrupt():
                    running[pool.submit(_counted, task, job)] = task
            if not running:
                return
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                counts = future.result()
                yield running.pop(future), counts
    except BrokenProcessPool as error:
        at_work = sorted(running.values(), key=lambda task: task.number)[:workers]
        remedy = f"If the memory was full, give fewer --workers; {GO_ON}"
        what = "a worker process died while preparing one of these inputs"
        raise UserError(what, "; ".join(map(_inputs, at_work)), remedy) from error
    finally:
        if running:  # Something went wrong, or Ctrl-C: what the workers are at would be minutes more.
            for child in set(multiprocessing.active_children()) - others:
                child.terminate()
        pool.shutdown(cancel_futures=True)


def _inputs(task: Task) -> str:
    first, last = task.shards[0].path, task.shards[-1].path
    return first if first == last else f"{first} to {last}"


@contextlib.contextmanager
def _no_interrupt() -> Iterator[None]:
    """Ctrl-C waits; processes that start meanwhile never get it, not even before `start_worker`: it is for this one."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def beam_pipeline(options: str) -> Any:
    """An empty pipeline of Apache Beam with the options of `--beam-options`.

    Raises:
      UserError: if Beam is not installed, or the options are wrong.
    """
    complaints = io.StringIO()  # Beam's usage is a page.
    logging.disable(logging.WARNING)  # Of Google's packages, which few runners need.
    try:
        import apache_beam as beam
        from apache_beam.options.pipeline_options import PipelineOptions

        with contextlib.redirect_stderr(complaints), contextlib.redirect_stdout(complaints):
            # No flag but these: without a list, it would read this program's own command line.
            parsed = PipelineOptions(shlex.split(options))
            parsed.get_all_options()  # Which finds wrong values; else they would be found when it runs.
            return beam.Pipeline(options=parsed)
    except ImportError as error:
        remedy = "Install it: pip install aimv2_jax[beam]"
        raise UserError("--runner beam needs Apache Beam", str(error), remedy) from error
    except (ValueError, SystemExit) as error:
        why = complaints.getvalue().strip().rpartition("error: ")[2] if isinstance(error, SystemExit) else str(error)
        remedy = "Write them as for any Beam pipeline"
        raise UserError(f"--beam-options cannot be used ({_line(why)})", options, remedy) from error
    finally:
        logging.disable(logging.NOTSET)


def run_beam(tasks: Sequence[Task], job: Job, pipeline: Any) -> None:
    """Does `tasks` by a `beam_pipeline`, whose workers read them from the output.

    Raises:
      UserError: if its runner can't be started, or a task met what the user can mend.
    """
    import apache_beam as beam

    todo = frozenset(task.number for task in tasks)
    output = Output(job.output)
    try:
        with _temporary_files(), pipeline:
            _ = (
                pipeline
                # The job holds the folder's name alone: a list of 200,000 inputs is more than runners accept.
                | beam.Create([job.output])
                | beam.FlatMap(_tasks)
                | beam.Filter(lambda task: task.number in todo)
                | beam.Reshuffle()
                | beam.Map(partial(_noting, job=job))
            )
    except Exception as error:
        if str(error).startswith("KeyboardInterrupt"):  # In a task of the DirectRunner, which makes an error of it.
            raise KeyboardInterrupt from error
        if failure := output.failure():
            raise failure from error
        if "[while running" in str(error):  # In a task: our bug.
            raise
        remedy = f"Look after the runner that --beam-options names, {GO_ON}"
        raise UserError(f"Beam could not run ({_line(str(error))})", type(pipeline.runner).__name__, remedy) from error
    if failure := output.failure():
        raise failure


def _line(text: str) -> str:
    """The beginning of a message, on one line."""
    return " ".join(text.split())[:_MOST_LETTERS]


@contextlib.contextmanager
def _temporary_files() -> Iterator[None]:
    """A folder for temporary files that goes at the end: Beam leaves its own behind."""
    before = tempfile.tempdir
    with tempfile.TemporaryDirectory(prefix="prepare-", ignore_cleanup_errors=True) as folder:
        tempfile.tempdir = folder
        try:
            yield
        finally:
            tempfile.tempdir = before


def _tasks(output: str) -> Iterator[Task]:
    return Output(output).tasks()


def _noting(task: Task, job: Job) -> None:
    """Notes down in the output what the user can mend: runners turn exceptions into text of many lines.

    What a bucket refused is raised, too, so that a runner that tries failed work again does.
    """
    try:
        run_task(task, job)
    except UserError as error:
        with contextlib.suppress(BucketError):  # Of the same bucket: `error` says it as well.
            Output(job.output).fail_task(task, error)
        if isinstance(error, BucketError):
            raise
