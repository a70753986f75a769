"""Arguments that the commands on a trained model share."""

from __future__ import annotations

import argparse


def add_checkpoint(parser: argparse.ArgumentParser) -> None:
    """The flag that every one of them has."""
    parser.add_argument(
        "--checkpoint", required=True, metavar="SPEC", help="WORKDIR (its best step), WORKDIR:STEP or WORKDIR:last"
    )
