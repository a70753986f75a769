"""Command lines of the modules: argparse, with every mistake told in one line and exit code 2."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import NoReturn

from aimv2_jax.errors import EXIT_USER


class Parser(argparse.ArgumentParser):
    """argparse without its usage dump on errors, and without abbreviations, which would hide misspelt flags."""

    def __init__(self, **kwargs):
        super().__init__(allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter, **kwargs)

    def error(self, message: str) -> NoReturn:
        print(f"error: {' '.join(message.splitlines())}. See --help.", file=sys.stderr)
        raise SystemExit(EXIT_USER)


def split_overrides(arguments: Sequence[str]) -> tuple[list[str], list[tuple[str, str]]]:
    """Takes `--config.KEY=VALUE` and `--config.KEY VALUE` out of a command line: (the rest, [(KEY, VALUE), …])."""
    rest, overrides = [], []
    words = iter(arguments)
    for word in words:
        if word.startswith("--config."):
            key, equals, value = word.removeprefix("--config.").partition("=")
            overrides.append((key, value if equals else next(words, "")))
        else:
            rest.append(word)
    return rest, overrides


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
