"""Metadata of installed packages, for tests that give a process other versions than it has."""

from __future__ import annotations

from pathlib import Path


def install(folder: Path, name: str, version: str, *requirements: str) -> None:
    """Writes what pip leaves of a package in `folder`, which Python finds where it is first in the path."""
    info = folder / f"{name}-{version}.dist-info"
    info.mkdir(parents=True)
    lines = ["Metadata-Version: 2.1", f"Name: {name}", f"Version: {version}"]
    (info / "METADATA").write_text("\n".join([*lines, *(f"Requires-Dist: {one}" for one in requirements), ""]))
