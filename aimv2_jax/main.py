"""Trains a config: `python -m aimv2_jax.main --config=experiments/quickstart.py --workdir=DIR`.

Data workers import this module again: jax, tensorflow and `aimv2_jax.train` are imported inside functions only.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Sequence
from types import FrameType
from typing import NamedTuple

from etils import epath

from aimv2_jax.allocator import keep_freed_memory
from aimv2_jax.config import Config, load_config
from aimv2_jax.errors import EXIT_AGAIN, UserError, reports_user_errors
from aimv2_jax.files import check_folder
from aimv2_jax.flags import Parser, positive, split_overrides
from aimv2_jax.parallel.clusters import Launch, find_place
from aimv2_jax.platforms import skip_absent_tpu
from aimv2_jax.versions import warn_of_versions

_EPILOG = """\
any key of the config can be set on the command line:
  --config.train.steps=20 --config.optimizer.betas="(0.9, 0.95)" --config.mesh.fsdp=4
The keys and their meaning: experiments/base.py.

A workdir that has checkpoints is continued from its newest one. SIGTERM to any process, a closed terminal, or Ctrl-C
saves the step that is being computed and ends the run; Ctrl-C again ends it without.
The same config with --config.train.cooldown_from=RUN:STEP and another workdir cools down from a kept step of that run.
Several processes are started with the same command on each host. TPU pods, GKE, Slurm and Open MPI say which is which;
elsewhere the flags do.
exit codes: 0 finished, 1 our bug, 2 you can mend it, 3 stopped by a guard (steps that are not finite, spikes
again and again, too much bad data, a device that computes wrongly), 4 hung twice, or devices failed twice, at the same
step, or trainers were killed three times without a new checkpoint, 75 stopped on request, hung once, a device failed, a
trainer was killed, the data could not be read, or another process went missing: start it again, 130 Ctrl-C without a
save
"""


class Command(NamedTuple):
    """What a command line asks for: what to train, where, as which process of a run; and what is seldom asked for."""

    config: Config
    workdir: epath.Path
    launch: Launch
    skip_examples: tuple[int, int] | None
    replay: int | None
    accept_data: str | None


def parse_arguments(arguments: Sequence[str]) -> Command:
    """A command line, with the checked config."""
    parser = Parser(prog="python -m aimv2_jax.main", description="Trains a config.", epilog=_EPILOG)
    add = parser.add_argument
    add("--config", required=True, metavar="FILE", help="an experiment, such as experiments/quickstart.py")
    add("--workdir", required=True, metavar="DIR", help="where checkpoints and metrics go, a folder or gs://BUCKET/...")
    add("--coordinator", metavar="HOST:PORT", help="of process 0, where the others find it")
    add("--processes", type=positive, metavar="N", help="of the run, all hosts together; 1: this one alone")
    add("--skip_examples", type=_examples, metavar="A:B", help="jump over all batches with examples A to B - 1")
    add(
        "--replay", type=positive, metavar="STEP", help="compute that step again, print norms of tensors, write nothing"
    )
    add(
        "--accept_data", metavar="DIGEST", help="go on with other data or another tokenizer, whose digest an error told"
    )
    add("--process", type=_index, metavar="I", help="this one, counted from 0")
    rest, overrides = split_overrides(arguments)
    flags = parser.parse_args(rest)
    config = load_config(flags.config, overrides)
    launch = Launch(flags.coordinator, flags.processes, flags.process)
    return Command(config, _folder(flags.workdir), launch, flags.skip_examples, flags.replay, flags.accept_data)


def _examples(text: str) -> tuple[int, int]:
    first, colon, end = text.partition(":")
    if not (colon and first.isdecimal() and end.isdecimal() and int(first) < int(end)):
        raise UserError("--skip_examples is no range of examples", text, "Give the first and the one behind the last")
    return int(first), int(end)


def _index(text: str) -> int:
    return 0 if text == "0" else positive(text)


def _folder(workdir: str) -> epath.Path:
    if not workdir:
        raise UserError("--workdir is empty", workdir, "Give a folder, such as runs/mine")
    try:
        path = epath.Path(workdir)
    except KeyError as error:  # What epath knows by its scheme, and nothing more of it.
        raise UserError("no such kind of storage", workdir, "Give a folder, or gs://BUCKET/FOLDER") from error
    check_folder(path, "--workdir")
    return path


@reports_user_errors
def main(arguments: Sequence[str] | None = None) -> int:
    """Trains by a command line: a process' own, in a child of it; or the one that is given, in this process."""
    skip_absent_tpu()
    keep_freed_memory()
    called = arguments is not None
    arguments = arguments if called else sys.argv[1:]
    from aimv2_jax.parallel import processes

    trainer = processes.trainer()
    if trainer is None and not called:  # A signal ends a trainer at once, and its parent knows what that means.
        _listen_early()
    command = parse_arguments(arguments)
    settings = command.config.processes
    if trainer is not None:
        return trainer.run(lambda: _train(command), settings)
    place = find_place(command.launch, settings)
    if place is not None:
        from aimv2_jax.parallel.supervisor import supervise

        return supervise(place, command.config, command.workdir, arguments)
    if called:
        return _train(command)
    from aimv2_jax.parallel.parent import run_trainer

    return run_trainer([sys.executable, "-m", "aimv2_jax.main", *arguments], command.workdir)


def _listen_early() -> None:
    """Lets SIGTERM, or a terminal that is closed, end this process with 75 until the trainer gets the signals."""

    def end(number: int, frame: FrameType | None) -> None:
        os._exit(EXIT_AGAIN)  # An exception could be taken for an error of the config file.

    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) == signal.SIG_DFL:
            signal.signal(number, end)


def _train(command: Command) -> int:
    warn_of_versions()  # Before jax is imported, which may fail then.
    from aimv2_jax.data import pipeline
    from aimv2_jax.data.tokenizer import Tokenizer

    config = command.config
    pipeline.check_sources(config)
    decoder = config.model.decoder
    tokenizer = Tokenizer(
        config.tokenizer.path, decoder.text_length, decoder.vocab_size, needs_end=config.loss.predict_eos
    )
    from aimv2_jax.export.donor import find_donor
    from aimv2_jax.train.loop import train

    donor = find_donor(config)
    if command.replay is not None:
        from aimv2_jax.train.replay import replay

        return replay(config, command.workdir, tokenizer, command.replay, donor, command.accept_data)
    return train(config, command.workdir, tokenizer, donor, command.skip_examples, command.accept_data)


if __name__ == "__main__":
    sys.exit(main())
