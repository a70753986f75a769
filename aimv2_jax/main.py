"""Trains a config: `python -m aimv2_jax.main --config=experiments/quickstart.py --workdir=DIR`.

Data workers import this module again: jax, tensorflow and `aimv2_jax.train` are imported inside functions only.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from aimv2_jax.config import Config, load_config
from aimv2_jax.errors import EXIT_FINISHED, UserError, reports_user_errors
from aimv2_jax.flags import Parser, split_overrides
from aimv2_jax.platforms import skip_absent_tpu

_EPILOG = """\
any key of the config can be set on the command line:
  --config.train.steps=20 --config.optimizer.betas="(0.9, 0.95)" --config.mesh.fsdp=4
The keys and their meaning: experiments/base.py.

A workdir that has checkpoints is continued from its newest one.
exit codes: 0 finished, 1 our bug, 2 you can mend it, 3 stopped by a guard (non-finite loss, too much bad data)
"""


def parse_arguments(arguments: Sequence[str]) -> tuple[Config, Path]:
    """The checked config and the workdir of a command line."""
    parser = Parser(prog="python -m aimv2_jax.main", description="Trains a config.", epilog=_EPILOG)
    parser.add_argument(
        "--config", required=True, metavar="FILE", help="an experiment, such as experiments/quickstart.py"
    )
    parser.add_argument("--workdir", required=True, metavar="DIR", help="where checkpoints and metrics go")
    rest, overrides = split_overrides(arguments)
    flags = parser.parse_args(rest)
    return load_config(flags.config, overrides), _local_folder(flags.workdir)


def _local_folder(workdir: str) -> Path:
    if not workdir:
        raise UserError("--workdir is empty", workdir, "Give a folder, such as runs/mine")
    if "://" in workdir:
        raise UserError("--workdir is no folder of this machine", workdir, "Mount the bucket, and give its folder")
    if Path(workdir).exists() and not Path(workdir).is_dir():
        raise UserError("--workdir is a file", workdir, "Give a folder")
    return Path(workdir)


@reports_user_errors
def main(arguments: Sequence[str] | None = None) -> int:
    skip_absent_tpu()
    config, workdir = parse_arguments(sys.argv[1:] if arguments is None else arguments)
    from aimv2_jax.data import pipeline
    from aimv2_jax.data.tokenizer import Tokenizer

    pipeline.check_sources(config)
    decoder = config.model.decoder
    tokenizer = Tokenizer(
        config.tokenizer.path, decoder.text_length, decoder.vocab_size, needs_end=config.loss.predict_eos
    )
    from aimv2_jax.train.loop import train

    train(config, workdir, tokenizer)
    return EXIT_FINISHED


if __name__ == "__main__":
    sys.exit(main())
