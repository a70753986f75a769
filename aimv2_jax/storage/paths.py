"""Resolution of data paths: plain paths, and `package:` paths inside the installed aimv2_jax."""

from __future__ import annotations

import os
from pathlib import Path

PACKAGE = "package:"
_ROOT = Path(__file__).parents[1]


def resolve_path(path: str) -> Path:
    """Resolves a `path` of a config; `package:data/sample/...` is inside the installed package, `~` is expanded."""
    if path.startswith(PACKAGE):
        return _ROOT / path.removeprefix(PACKAGE)
    return Path(os.path.expanduser(path))
