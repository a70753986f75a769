"""Where data lies: plain paths, and `package:` paths inside the installed aimv2_jax."""

from __future__ import annotations

import os
from pathlib import Path

import aimv2_jax

PACKAGE = "package:"


def locate(path: str) -> Path:
    """The file or folder that a config's `path` names: `package:data/sample/...` lies inside the installed package."""
    if path.startswith(PACKAGE):
        return Path(aimv2_jax.__file__).parent / path.removeprefix(PACKAGE)
    return Path(os.path.expanduser(path))
