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
from aimv2_jax.cli import Parser, non_negative, positive, split_overrides
from aimv2_jax.config.load import load_config
from aimv2_jax.config.schema import Config
from aimv2_jax.distributed.cluster import LaunchFlags, find_process
from aimv2_jax.errors import EXIT_RETRY, UserError, cli_main
from aimv2_jax.platforms import repeat_gpu_sums, skip_absent_tpu
from aimv2_jax.storage.bucket import scheme_of
from aimv2_jax.storage.files import check_folder
from aimv2_jax.storage.retries import DATA_RETRIES, STORAGE_RETRIES
from aimv2_jax.version import warn_of_versions

_EPILOG = """\
Any key of the config can be set on the command line:
  --config.train.steps=20 --config.optimizer.betas="(0.9, 0.95)" --config.mesh.fsdp=4
The keys are documented in experiments/base.py.

A run whose workdir has checkpoints resumes from the newest one. SIGTERM to any process, a closed terminal, or Ctrl-C
saves the current step and ends the run; a second Ctrl-C ends it without a save.
To cool down from a kept step of a run, use the same config, another workdir and --config.train.cooldown_from=RUN:STEP.
To train with several processes, start the same command on each host. On TPU pods, GKE, Slurm and Open MPI the process
indices are detected; elsewhere give --coordinator, --processes and --process.

exit codes:
  0    finished
  1    bug in aimv2_jax
  2    user error
  3    stopped by a guard: non-finite steps, repeated spikes, too much bad data, a device that computes wrongly
  4    hung twice, or devices failed twice, at the same step; or trainers were killed three times without a new
       checkpoint
  75   stopped on request, hung once, a device failed, a trainer was killed, the data could not be read, or another
       process went missing: start the same command again
  130  Ctrl-C without a save
"""


class Command(NamedTuple):
    """A parsed command line."""

    config: Config
    workdir: epath.Path
    launch: LaunchFlags
    skip_examples: tuple[int, int] | None
    replay: int | None
    accept_data: str | None


def parse_arguments(arguments: Sequence[str]) -> Command:
    """Parses a command line, and loads and checks its config."""
    parser = Parser(prog="python -m aimv2_jax.main", description="Trains a config.", epilog=_EPILOG)
    add = parser.add_argument
    example = "experiments/quickstart.py or experiments/pretrain.py:large"
    add("--config", required=True, metavar="FILE[:RUN]", help=f"config of an experiment, such as {example}")
    add("--workdir", required=True, metavar="DIR", help="folder for checkpoints and metrics, or gs://BUCKET/...")
    add("--coordinator", metavar="HOST:PORT", help="address of process 0")
    add("--processes", type=positive, metavar="N", help="number of processes on all hosts together")
    add("--skip_examples", type=_examples, metavar="A:B", help="skip all batches with examples A to B - 1")
    add("--replay", type=positive, metavar="STEP", help="recompute a step, print norms of tensors, write nothing")
    add(
        "--accept_data",
        metavar="DIGEST",
        help="resume with other data or another tokenizer; the error about the change gives its digest",
    )
    add("--process", type=non_negative, metavar="I", help="index of this process, from 0")
    rest, overrides = split_overrides(arguments)
    flags = parser.parse_args(rest)
    config = load_config(flags.config, overrides)
    launch = LaunchFlags(flags.coordinator, flags.processes, flags.process)
    return Command(config, _folder(flags.workdir), launch, flags.skip_examples, flags.replay, flags.accept_data)


def _examples(text: str) -> tuple[int, int]:
    first, colon, end = text.partition(":")
    if not (colon and first.isdecimal() and end.isdecimal() and int(first) < int(end)):
        raise UserError(
            "--skip_examples is not a range of examples",
            text,
            "Give A:B, from the first example to the one after the last",
        )
    return int(first), int(end)


def _folder(workdir: str) -> epath.Path:
    if not workdir:
        raise UserError("--workdir is empty", workdir, "Give a folder, such as runs/mine")
    check_folder(workdir, "--workdir")
    if scheme_of(workdir) not in ("", "gs"):
        raise UserError("--workdir: checkpoints are not written there", workdir, "Give a folder, or gs://BUCKET/FOLDER")
    return epath.Path(workdir)


@cli_main
def main(arguments: Sequence[str] | None = None) -> int:
    """Trains by a command line: that of the process, in a child process; or `arguments`, in this process."""
    skip_absent_tpu()
    repeat_gpu_sums()
    keep_freed_memory()
    in_process = arguments is not None
    arguments = arguments if in_process else sys.argv[1:]
    for count in (DATA_RETRIES, STORAGE_RETRIES):
        count.take()  # Those of an earlier run of this process are not this run's.
    from aimv2_jax.distributed import coordination

    trainer = coordination.trainer()
    # A signal ends a trainer at once, and its parent turns that into an exit code.
    if trainer is None and not in_process:
        _handle_early_signals()
    command = parse_arguments(arguments)
    settings = command.config.processes
    if trainer is not None:
        return trainer.run(lambda: _train(command), settings)
    process = find_process(command.launch, settings)
    if process is not None:
        from aimv2_jax.distributed.supervisor import supervise

        return supervise(process, command.config, command.workdir, arguments)
    if in_process:
        return _train(command)
    from aimv2_jax.distributed.parent import run_trainer

    return run_trainer([sys.executable, "-m", "aimv2_jax.main", *arguments], command.workdir)


def _handle_early_signals() -> None:
    """Ends this process with 75 on SIGTERM or a closed terminal, until the trainer handles these signals."""

    def end(number: int, frame: FrameType | None) -> None:
        os._exit(EXIT_RETRY)  # An exception could be mistaken for an error in the config file.

    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) == signal.SIG_DFL:
            signal.signal(number, end)


def _train(command: Command) -> int:
    warn_of_versions()  # Called before the import of jax, which may fail with other versions.
    from aimv2_jax.data import pipeline
    from aimv2_jax.data.tokenizer import load_tokenizer

    config = command.config
    sources = pipeline.open_sources(config)
    tokenizer = load_tokenizer(config)
    from aimv2_jax.pretrained.init_source import find_weight_source
    from aimv2_jax.pretrained.teacher import find_teacher
    from aimv2_jax.train.trainer import train

    weights = dict(open_weights=find_weight_source(config), open_teacher=find_teacher(config))
    data = dict(accept_data=command.accept_data, sources=sources)
    if command.replay is not None:
        from aimv2_jax.train.replay import replay

        return replay(config, command.workdir, tokenizer, command.replay, **weights, **data)
    return train(config, command.workdir, tokenizer, skip_examples=command.skip_examples, **weights, **data)


if __name__ == "__main__":
    sys.exit(main())
