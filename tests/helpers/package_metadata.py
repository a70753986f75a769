"""Fake package metadata, for tests that let a process see other versions than the installed ones."""

from __future__ import annotations

from pathlib import Path


def install(folder: Path, name: str, version: str, *requirements: str) -> None:
    """Writes the dist-info of a package to `folder`; Python finds it if `folder` is first in the path."""
    info = folder / f"{name}-{version}.dist-info"
    info.mkdir(parents=True)
    lines = ["Metadata-Version: 2.1", f"Name: {name}", f"Version: {version}"]
    (info / "METADATA").write_text("\n".join([*lines, *(f"Requires-Dist: {text}" for text in requirements), ""]))
