"""Writes the exact versions of a tested environment, for `pip install -c`, and with hashes.

Run it with that environment's Python; uv must be on the path and looks up the hashes:

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
# torch has several builds (CPU, CUDA) of one version, so machines install different files.
EXCLUDED = "torch"
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
    """Yields the requirements of an installed package with these extras: names, and the extras of each."""
    for text in importlib.metadata.requires(package) or ():
        required = Requirement(text)
        marker = required.marker
        if marker is None or any(marker.evaluate({"extra": extra}) for extra in {"", *extras}):
            yield canonicalize_name(required.name), frozenset(required.extras)


def pinned() -> tuple[dict[str, str], set[str]]:
    """Returns the versions of all requirements of aimv2_jax with all extras, and the names of missing packages."""
    versions, absent, seen = {}, set(), set()
    extras = importlib.metadata.metadata("aimv2_jax").get_all("Provides-Extra")
    queue = list(requirements("aimv2_jax", frozenset(extras)))
    while queue:
        name, extras = queue.pop()
        if name == EXCLUDED or (name, extras) in seen:
            continue
        seen.add((name, extras))
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            absent.add(name)
            continue
        queue += requirements(name, extras)
    return dict(sorted(versions.items())), absent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--uv", default="uv", help="the program uv (pip install uv)")
    uv = parser.parse_args().uv
    versions, absent = pinned()
    name = f"jax-{'.'.join(versions['jax'].split('.')[:2])}"
    pins = "".join(f"{package}=={version}\n" for package, version in versions.items())
    command = [uv, "pip", "compile", "--quiet", "--generate-hashes", "--no-deps", "--no-header", "--no-annotate", "-"]
    command += ["--python-version", platform.python_version()]
    hashed = subprocess.run(command, input=pins, text=True, stdout=subprocess.PIPE, check=True).stdout
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
