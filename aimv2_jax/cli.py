"""Command-line parsing: argparse with one-line errors and exit code 2."""

from __future__ import annotations

import argparse
import math
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from aimv2_jax.errors import EXIT_USER, UserError

_SIZE_UNITS = {"": 1, "b": 1} | {
    f"{prefix}{unit}": base**power
    for unit, base in (("b", 1000), ("ib", 1024))
    for power, prefix in enumerate("kmgt", start=1)
}
_MIN_SIZE_BYTES = 1000  # A bare "1" lacks its unit.
_RENAMED = {"--max-pictures": "--max-images", "--picture": "--image"}  # Flags of older versions.


class Parser(argparse.ArgumentParser):
    """argparse without the usage text on errors, and without abbreviations, which would hide misspelt flags."""

    def __init__(self, **kwargs):
        super().__init__(allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter, **kwargs)

    def error(self, message: str) -> NoReturn:
        own_flags = re.findall(r"--[\w-]+", self.format_usage())
        names = [_RENAMED.get(word) for word in re.split(r"[\s=]", message)]
        remedy = next((f"It is called {name} now" for name in names if name in own_flags), "See --help")
        print(f"error: {' '.join(message.splitlines())}. {remedy}.", file=sys.stderr)
        raise SystemExit(EXIT_USER)


def split_overrides(arguments: Sequence[str]) -> tuple[list[str], list[tuple[str, str]]]:
    """Splits `--config.KEY=VALUE` and `--config.KEY VALUE` from a command line: (the rest, [(KEY, VALUE), …])."""
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
    """Parses an integer from 1 to `most`; for argparse's `type=`."""
    try:
        value = int(text)
    except ValueError:
        value = 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number above zero")
    if value > most:
        raise argparse.ArgumentTypeError(f"{text!r} is more than {most}")
    return value


def non_negative(text: str) -> int:
    """Parses an integer of at least 0; for argparse's `type=`."""
    return 0 if text == "0" else positive(text)


def positive_number(text: str) -> float:
    """Parses a finite number above zero; for argparse's `type=`."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number above zero")
    return value


def size(text: str) -> int:
    """Parses a size such as 1GB or 256MiB as its number of bytes; for argparse's `type=`."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?) ?([A-Za-z]*)", text.strip())
    unit = _SIZE_UNITS.get(match[2].lower()) if match else None
    if match is None or unit is None:
        raise argparse.ArgumentTypeError(f"{text!r} is not a size such as 1GB, 500MB or 256MiB")
    num_bytes = int(min(float(match[1]) * unit, sys.maxsize))
    if num_bytes < _MIN_SIZE_BYTES:
        raise argparse.ArgumentTypeError(f"{text!r} is below {_MIN_SIZE_BYTES} bytes; add a unit, as in 1GB")
    return num_bytes


def check_output(file: Path, suffix: str = "", flag: str = "--output") -> None:
    """Checks `--output FILE` (or another `flag`) before any work is done; raises `UserError`."""
    if not file.name.lower().endswith(suffix):
        raise UserError(f"{flag}: the name does not end in {suffix}", str(file), f"Give a file such as new{suffix}")
    if file.is_dir() or not file.name:
        raise UserError(f"{flag} is a folder", str(file), f"Give a file in it, such as {file / ('new' + suffix)}")
    if not file.parent.is_dir():
        raise UserError(f"{flag}: no such folder", str(file.parent), "Create it first, or give another file")


def make_output_folder(folder: Path) -> None:
    """Creates the folder of `--output DIR` before any work is done; raises `UserError` if its path contains a file."""
    if any(path.exists() and not path.is_dir() for path in (folder, *folder.parents)):
        raise UserError("--output is a file, or below a file", str(folder), "Give a folder")
    folder.mkdir(parents=True, exist_ok=True)
