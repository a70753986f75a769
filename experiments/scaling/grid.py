"""Lists the runs of a scaling study, and starts those that are not finished.

    python experiments/scaling/grid.py --workdir=runs/scaling --start
    python experiments/scaling/grid.py --workdir=gs://BUCKET/scaling --study=paper

The first trains the miniature study on the bundled pictures, one run after another; stopped or killed, the same command
goes on. The second lists the paper's and prints a command for each run, to be started on pods: nothing starts without
--start. --sizes, --samples, --batch, --scale and --config change the study, and any key of the config can be set, as in
--config.data.sources.web=data/web. Then: python experiments/scaling/fit.py --workdir=runs/scaling
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

from aimv2_jax.errors import EXIT_AGAIN, EXIT_FINISHED, UserError, reports_user_errors  # noqa: E402
from aimv2_jax.flags import Parser, positive, split_overrides  # noqa: E402
from aimv2_jax.platforms import skip_absent_tpu  # noqa: E402
from aimv2_jax.train.checkpoint import CheckpointReader  # noqa: E402
from aimv2_jax.train.resume import check_resumable  # noqa: E402
from experiments.scaling.study import STUDIES, Run, Study, plan  # noqa: E402

Trainer = Callable[[Run], int]
"""Trains a run until it ends, and returns its exit code."""


def reached(run: Run) -> int:
    """The newest step that is saved, or the one that it starts from.

    Raises:
      UserError: where its folder is that of another run.
    """
    reader = CheckpointReader(run.workdir)
    latest = reader.latest_step()
    if latest is None:
        return run.start
    check_resumable(reader.meta(latest)["config"], run.config)
    return latest


def missing(runs: Sequence[Run]) -> list[Run]:
    """Those that are not finished; a trunk only where a cooldown still has to start from one of its steps."""
    unfinished = [run for run in runs if reached(run) < run.steps]
    waiting = {run.size for run in unfinished if run.config.cooldown is not None and reached(run) == run.start}
    return [run for run in unfinished if run.config.cooldown is not None or run.size in waiting]


def start(runs: Sequence[Run], trainer: Trainer, stopped: Callable[[], bool]) -> int:
    """Trains what is missing, one after another; EXIT_FINISHED, or EXIT_AGAIN where it was asked to stop.

    A trainer that ends with EXIT_AGAIN is started again, as long as each time it has come further.

    Raises:
      UserError: where a run ended otherwise.
    """
    todo = missing(runs)
    for number, run in enumerate(todo, start=1):
        code = None
        while code != EXIT_FINISHED:
            before = reached(run)
            print(f"--- run {number} of {len(todo)}: {run.name}, from step {before} to {run.steps}", flush=True)
            code = trainer(run)
            if stopped():
                print("stopped on request; the same command goes on", flush=True)
                return EXIT_AGAIN
            if code not in (EXIT_FINISHED, EXIT_AGAIN) or (code == EXIT_AGAIN and reached(run) == before):
                remedy = "See above why, mend it and start the same command again: what is finished is skipped"
                raise UserError(f"run {run.name} of the study ended before its last step, with exit code", code, remedy)
    print(f"all {len(runs)} runs are finished", flush=True)
    return EXIT_FINISHED


class Subprocess:
    """The trainer as a process of its own; SIGTERM and Ctrl-C to this process are handed on to it."""

    def __init__(self) -> None:
        self._process: subprocess.Popen | None = None
        self._stopped = False

    def stopped(self) -> bool:
        return self._stopped

    def __call__(self, run: Run) -> int:
        if self._stopped:
            return EXIT_AGAIN
        command = [sys.executable, "-m", "aimv2_jax.main", *run.arguments]
        paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths)}
        # In a session of its own: a terminal's Ctrl-C would reach it twice, and a second one ends it without a save.
        self._process = subprocess.Popen(command, env=environment, start_new_session=True)
        if self._stopped:  # While it was started.
            self._process.terminate()
        return self._process.wait()

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        before = {number: signal.signal(number, self._hand_on) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _hand_on(self, number: int, frame: object) -> None:
        self._stopped = True
        if self._process is not None and self._process.poll() is None:
            self._process.send_signal(number)


def table(runs: Sequence[Run]) -> str:
    """The runs with their parameters, steps, samples, FLOPs and how far they are.

    Only shapes are computed, and jax opens no device: those are the trainers'.
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
    lines.append(f"{len(runs)} runs, {cost:.3g} FLOPs together; each column counts a cooldown with its trunk's part")
    return "\n".join(lines)


def _names(text: str) -> tuple[str, ...]:
    names = tuple(dict.fromkeys(filter(None, text.split(","))))
    if not names:
        raise argparse.ArgumentTypeError(f"{text!r} names none")
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
    """The study, its folder, whether to start it, and keys that all runs get."""
    summary, _, epilog = __doc__.partition("\n\n")
    parser = Parser(prog="python experiments/scaling/grid.py", description=summary, epilog=epilog)
    add = parser.add_argument
    add("--workdir", required=True, metavar="DIR", help="where the runs lie, a folder or gs://BUCKET/...")
    add("--study", choices=STUDIES, default="miniature", help="what the flags below change (default %(default)s)")
    add("--config", metavar="FILE", help="the experiment; {size} in it becomes the size's name")
    add("--sizes", type=_names, metavar="A,B", help="encoders, of aimv2_jax/models/sizes.py")
    add("--samples", type=_counts, metavar="N,M", help="of each point, its cooldown included, such as 5e8,1.6e9")
    add("--batch", type=positive, metavar="B", help="examples a step")
    add("--scale", type=float, metavar="S", help="samples x S, batch and warm-up x its root (default 1)")
    add("--start", action="store_true", help="train what is missing; without, it is only listed")
    rest, overrides = split_overrides(arguments)
    flags = parser.parse_args(rest)
    given = {field.name: getattr(flags, field.name, None) for field in dataclasses.fields(Study)}
    study = dataclasses.replace(
        STUDIES[flags.study], **{key: value for key, value in given.items() if value is not None}
    )
    return study, flags.workdir, flags.start, overrides


@reports_user_errors
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
