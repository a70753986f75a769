"""Writes the exact versions of an environment that the test suite passed with, for `pip install -c`, and with hashes.

Run it by that environment's Python, with uv on the path, which looks up the hashes:

    .venv/bin/python constraints/write.py [--uv UV]
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import platform
import subprocess
from collections.abc import Iterator
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

FOLDER = Path(__file__).parent
# torch has one version and several builds (CPU, CUDA), of which machines install different files.
LEFT_OUT = "torch"
HEADER = """\
# Versions that the test suite passed with on Python {python}, {system}; written on {date} by constraints/write.py.
# Use: {use}
# Left out: torch (of the extra `test`) and what it alone needs, as its files differ by machine; packages of the extras
# that were not installed: {absent}.
"""
USES = {
    "": "pip install -c constraints/{name}.txt .",
    "-hashes": "pip install --require-hashes --no-deps -r constraints/{name}-hashes.txt && pip install --no-deps .",
}


def requirements(package: str, extras: frozenset[str]) -> Iterator[tuple[str, frozenset[str]]]:
    """What an installed package asks for here, with these extras: names, and the extras of each."""
    for text in importlib.metadata.requires(package) or ():
        required = Requirement(text)
        marker = required.marker
        if marker is None or any(marker.evaluate({"extra": extra}) for extra in {"", *extras}):
            yield canonicalize_name(required.name), frozenset(required.extras)


def pinned() -> tuple[dict[str, str], set[str]]:
    """Versions of all that aimv2_jax needs with all of its extras, and the names of what is not installed."""
    versions, absent, seen = {}, set(), set()
    extras = importlib.metadata.metadata("aimv2_jax").get_all("Provides-Extra")
    waiting = list(requirements("aimv2_jax", frozenset(extras)))
    while waiting:
        name, extras = waiting.pop()
        if name == LEFT_OUT or (name, extras) in seen:
            continue
        seen.add((name, extras))
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            absent.add(name)
            continue
        waiting += requirements(name, extras)
    return dict(sorted(versions.items())), absent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--uv", default="uv", help="the program uv (pip install uv)")
    uv = parser.parse_args().uv
    versions, absent = pinned()
    name = f"jax-{'.'.join(versions['jax'].split('.')[:2])}"
    pins = "".join(f"{package}=={version}\n" for package, version in versions.items())
    compiling = [uv, "pip", "compile", "--quiet", "--generate-hashes", "--no-deps", "--no-header", "--no-annotate", "-"]
    compiling += ["--python-version", platform.python_version()]
    hashed = subprocess.run(compiling, input=pins, text=True, stdout=subprocess.PIPE, check=True).stdout
    for suffix, text in {"": pins, "-hashes": hashed}.items():
        header = HEADER.format(
            python=platform.python_version(),
            system=f"{platform.system()} {platform.machine()}",
            date=datetime.date.today(),
            use=USES[suffix].format(name=name),
            absent=", ".join(sorted(absent)) or "none",
        )
        (FOLDER / f"{name}{suffix}.txt").write_text(header + text)
        print(f"constraints/{name}{suffix}.txt: {len(versions)} packages")


if __name__ == "__main__":
    main()
