"""Lists the runs of a scaling study and starts the unfinished ones.

    python experiments/scaling/grid.py --workdir=runs/scaling --start
    python experiments/scaling/grid.py --workdir=gs://BUCKET/scaling --study=paper

The first trains the miniature study on the bundled images, one run after another; the same command resumes it. The
second lists the paper's study and prints a command for each run, to be started on pods: nothing starts without --start.
--sizes, --samples, --batch, --scale and --config change the study, and any config key can be set, as in
--config.data.sources.web=data/web. Next: python experiments/scaling/fit.py --workdir=runs/scaling
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from aimv2_jax.checkpoint.checkpointer import CheckpointReader  # noqa: E402
from aimv2_jax.cli import Parser, positive, split_overrides  # noqa: E402
from aimv2_jax.errors import EXIT_FINISHED, EXIT_RETRY, UserError, cli_main  # noqa: E402
from aimv2_jax.platforms import skip_absent_tpu  # noqa: E402
from aimv2_jax.train.resume import check_resumable  # noqa: E402
from experiments.scaling.study import STUDIES, Run, Study, plan  # noqa: E402

Trainer = Callable[[Run], int]
"""Trains a run until it ends and returns its exit code."""


def reached(run: Run) -> int:
    """Returns the newest saved step, or the run's start step.

    Raises:
      UserError: if its folder contains another run.
    """
    reader = CheckpointReader(run.workdir)
    latest = reader.latest_step()
    if latest is None:
        return run.start
    check_resumable(reader.meta(latest)["config"], run.config)
    return latest


def missing(runs: Sequence[Run]) -> list[Run]:
    """Returns the unfinished runs; a trunk only if a cooldown has yet to start from one of its steps."""
    unfinished = [run for run in runs if reached(run) < run.steps]
    waiting = {run.size for run in unfinished if run.config.cooldown is not None and reached(run) == run.start}
    return [run for run in unfinished if run.config.cooldown is not None or run.size in waiting]


def start(runs: Sequence[Run], trainer: Trainer, stopped: Callable[[], bool]) -> int:
    """Trains the unfinished runs in sequence; returns EXIT_FINISHED, or EXIT_RETRY after a stop request.

    A trainer that ends with EXIT_RETRY is restarted as long as it makes progress.

    Raises:
      UserError: if a run ends otherwise.
    """
    todo = missing(runs)
    for number, run in enumerate(todo, start=1):
        code = None
        while code != EXIT_FINISHED:
            before = reached(run)
            print(f"--- run {number} of {len(todo)}: {run.name}, from step {before} to {run.steps}", flush=True)
            code = trainer(run)
            if stopped():
                print("stopped on request; the same command resumes the study", flush=True)
                return EXIT_RETRY
            if code not in (EXIT_FINISHED, EXIT_RETRY) or (code == EXIT_RETRY and reached(run) == before):
                remedy = "Fix the error above and start the same command again; finished runs are skipped"
                raise UserError(f"run {run.name} of the study ended before its last step, with exit code", code, remedy)
    print(f"all {len(runs)} runs are finished", flush=True)
    return EXIT_FINISHED


class Subprocess:
    """The trainer as a subprocess, to which SIGTERM and Ctrl-C are forwarded."""

    def __init__(self) -> None:
        self._process: subprocess.Popen | None = None
        self._stopped = False

    def stopped(self) -> bool:
        return self._stopped

    def __call__(self, run: Run) -> int:
        if self._stopped:
            return EXIT_RETRY
        command = [sys.executable, "-m", "aimv2_jax.main", *run.arguments]
        paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths)}
        # A new session, since a terminal's Ctrl-C would otherwise reach the trainer twice and end it without a save.
        self._process = subprocess.Popen(command, env=environment, start_new_session=True)
        if self._stopped:  # The signal came during the start.
            self._process.terminate()
        return self._process.wait()

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        before = {number: signal.signal(number, self._forward) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _forward(self, number: int, frame: object) -> None:
        self._stopped = True
        if self._process is not None and self._process.poll() is None:
            self._process.send_signal(number)


def table(runs: Sequence[Run]) -> str:
    """Returns a table of the runs: parameters, steps, samples, FLOPs and progress.

    Only shapes are computed. jax opens no device, since the trainers need them.
    """
    rows = [("run", "encoder", "model", "steps", "batch", "samples", "FLOPs", "done")]
    for run in runs:
        encoder, whole = (f"{count:,}" for count in run.parameters)
        step = reached(run)
        done = "yes" if step >= run.steps else f"{step:,}" if step > run.start else "-"
        steps = f"{run.start:,} + {run.steps - run.start:,}" if run.start else f"{run.steps:,}"
        row = (steps, f"{run.config.data.batch_size:,}", f"{run.samples:,}", f"{run.flops:.3g}", done)
        rows.append((run.name, encoder, whole, *row))
    widths = [max(map(len, column)) for column in zip(*rows)]
    lines = [
        "  ".join([row[0].ljust(widths[0]), *(text.rjust(width) for text, width in zip(row[1:], widths[1:]))])
        for row in rows
    ]
    cost = sum(run.flops * (1 - run.start / run.steps) for run in runs)
    lines.append(
        f"{len(runs)} runs, {cost:.3g} FLOPs in total; the columns of a cooldown include its part of the trunk"
    )
    return "\n".join(lines)


def _names(text: str) -> tuple[str, ...]:
    names = tuple(dict.fromkeys(filter(None, text.split(","))))
    if not names:
        raise argparse.ArgumentTypeError(f"{text!r} has no name")
    return names


def _counts(text: str) -> tuple[int, ...]:
    try:
        counts = {round(float(word)) for word in filter(None, text.split(","))}
    except (ValueError, OverflowError):
        counts = set()
    if not counts or min(counts) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not whole numbers above zero, such as 5e8,6.4e9")
    return tuple(sorted(counts))


def parse_arguments(arguments: Sequence[str]) -> tuple[Study, str, bool, list[tuple[str, str]]]:
    """Returns the study, its folder, whether to start it, and the overrides of all runs."""
    summary, _, epilog = __doc__.partition("\n\n")
    parser = Parser(prog="python experiments/scaling/grid.py", description=summary, epilog=epilog)
    add = parser.add_argument
    add("--workdir", required=True, metavar="DIR", help="folder of the runs, local or gs://BUCKET/...")
    add("--study", choices=STUDIES, default="miniature", help="the base of the flags below (default %(default)s)")
    add("--config", metavar="FILE", help="the experiment; {size} is replaced by the size's name")
    add("--sizes", type=_names, metavar="A,B", help="encoders from aimv2_jax/models/sizes.py")
    add(
        "--samples",
        type=_counts,
        metavar="N,M",
        help="samples of each point, including its cooldown, such as 5e8,1.6e9",
    )
    add("--batch", type=positive, metavar="B", help="examples a step")
    add(
        "--scale", type=float, metavar="S", help="scales samples by S, batch and warm-up by its square root (default 1)"
    )
    add("--start", action="store_true", help="train the unfinished runs; otherwise they are only listed")
    rest, overrides = split_overrides(arguments)
    flags = parser.parse_args(rest)
    given = {field.name: getattr(flags, field.name, None) for field in dataclasses.fields(Study)}
    study = dataclasses.replace(
        STUDIES[flags.study], **{key: value for key, value in given.items() if value is not None}
    )
    return study, flags.workdir, flags.start, overrides


@cli_main
def main(arguments: Sequence[str] | None = None) -> int:
    skip_absent_tpu()
    study, workdir, starts, overrides = parse_arguments(sys.argv[1:] if arguments is None else arguments)
    runs = plan(study, workdir, overrides)
    print(table(runs), flush=True)
    trainer = Subprocess()
    if starts:
        with trainer.listening():
            return start(runs, trainer, trainer.stopped)
    for run in missing(runs):
        print(shlex.join(["python", "-m", "aimv2_jax.main", *run.arguments]))
    return EXIT_FINISHED


if __name__ == "__main__":
    sys.exit(main())
