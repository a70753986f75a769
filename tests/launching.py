"""Launch scripts under test: their environment, and programs that stand in for those of a cluster."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Sequence
from pathlib import Path

from tiny import ROOT

LAUNCH = ROOT / "launch"


def stand_in(folder: Path, name: str, body: str) -> Path:
    """An executable bash script `name` in `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / name
    path.write_text(f"#!/usr/bin/env bash\n{body}")
    path.chmod(0o755)
    return path


def environment(programs: Path, **variables: object) -> dict[str, str]:
    """This process' own, with the programs of a folder found first."""
    return os.environ | {"PATH": f"{programs}:{os.environ['PATH']}"} | {k: str(v) for k, v in variables.items()}


def run(words: Sequence[object], env: dict[str, str] | None = None, **options: object) -> subprocess.CompletedProcess:
    return subprocess.run([str(w) for w in words], env=env, capture_output=True, text=True, timeout=120, **options)
