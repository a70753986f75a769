"""Helpers for tests of launch scripts: their environment and stand-ins for a cluster's programs."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Sequence
from pathlib import Path

from tests.helpers.tiny import ROOT

LAUNCH = ROOT / "launch"


def stand_in(folder: Path, name: str, body: str) -> Path:
    """Writes an executable bash script `name` to `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / name
    path.write_text(f"#!/usr/bin/env bash\n{body}")
    path.chmod(0o755)
    return path


def environment(programs: Path, **variables: object) -> dict[str, str]:
    """This process' environment, with the programs of a folder first in PATH."""
    return os.environ | {"PATH": f"{programs}:{os.environ['PATH']}"} | {k: str(v) for k, v in variables.items()}


def run(words: Sequence[object], env: dict[str, str] | None = None, **options: object) -> subprocess.CompletedProcess:
    return subprocess.run([str(w) for w in words], env=env, capture_output=True, text=True, timeout=120, **options)
