"""How often trainers of a run were killed since its newest checkpoint: by the system's want of memory, or a crash in C.

Starting again cures an accident. A run that is killed before it reaches its next checkpoint, again and again, would be
started for ever.
"""

from __future__ import annotations

import contextlib
import json

from etils import epath

from aimv2_jax.files import write_whole
from aimv2_jax.untrusted import as_int, parse_json_object

MAX_KILLS = 3  # With no new checkpoint from the first to the last.
FILE = "kills.json"
_CHECKPOINTS = "checkpoints"  # As train/step_folders.py has it, which needs jax.
_MOST = 1_000_000


def count_kill(workdir: epath.PathLike) -> int:
    """Counts one more; how many there were since the newest checkpoint. A workdir that cannot be read counts none."""
    kills = 1
    with contextlib.suppress(Exception):  # OSError, and of a bucket TensorFlow's and fsspec's own kinds.
        newest = _newest_step(workdir)
        kills += _kills_since(workdir, newest)
        content = {"newest_step": newest, "kills": kills}
        write_whole(epath.Path(workdir) / FILE, json.dumps(content).encode() + b"\n")
    return kills


def _kills_since(workdir: epath.PathLike, newest: int) -> int:
    """Those that were counted at the same newest step."""
    file = epath.Path(workdir) / FILE
    if not file.exists():
        return 0
    try:
        known = parse_json_object(file.read_bytes())
        return as_int(known.get("kills"), 0, _MOST) if known.get("newest_step") == newest else 0
    except ValueError:  # Not ours.
        return 0


def _newest_step(workdir: epath.PathLike) -> int:
    folder = epath.Path(workdir) / _CHECKPOINTS
    names = [child.name for child in folder.iterdir()] if folder.is_dir() else []
    return max((int(name) for name in names if name.isdecimal()), default=0)
