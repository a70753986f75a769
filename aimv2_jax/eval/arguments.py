"""Arguments that the commands on a trained model share."""

from __future__ import annotations

import argparse


def add_checkpoint(parser: argparse.ArgumentParser) -> None:
    """The flags that every one of them has."""
    parser.add_argument(
        "--checkpoint", required=True, metavar="SPEC", help="WORKDIR (its best step), WORKDIR:STEP or WORKDIR:last"
    )
    parser.add_argument(
        "--weights",
        choices=("average", "raw"),
        default="average",
        help="the average of the parameters, where the run kept one (default), or those of that very step",
    )
