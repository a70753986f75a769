"""Arguments that the commands on a trained model share."""

from __future__ import annotations

import argparse


def add_checkpoint(parser: argparse.ArgumentParser) -> None:
    """The flag that every one of them has."""
    parser.add_argument(
        "--checkpoint", required=True, metavar="SPEC", help="WORKDIR (its best step), WORKDIR:STEP or WORKDIR:last"
    )


def positive(text: str, most: int = 2**31 - 1) -> int:
    """A whole number above zero and up to `most`, for `type=`."""
    try:
        value = int(text)
    except ValueError:
        value = 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number above zero")
    if value > most:
        raise argparse.ArgumentTypeError(f"{text!r} is more than {most}")
    return value
