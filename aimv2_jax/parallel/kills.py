"""How often trainers of a run were killed since its newest checkpoint: by the system's want of memory, or a crash in C.

Starting again cures an accident. A run that is killed before it reaches its next checkpoint, again and again, would be
started for ever.
"""

from __future__ import annotations

import contextlib
import json
import re
import threading

from etils import epath

from aimv2_jax.files import is_remote, write_whole
from aimv2_jax.untrusted import as_int, parse_json_object

MAX_KILLS = 3  # With no new checkpoint from the first to the last.
FILE = "kills.json"
# As train/step_folders.py and manifest.py have them, which need jax.
_CHECKPOINTS, _MANIFEST, _SET_ASIDE = "checkpoints", "manifest.json", "set_aside.json"
_MOST = 1_000_000
_PATIENCE_S = 5.0


def count_kill_within(workdir: epath.PathLike, seconds: float = _PATIENCE_S) -> int:
    """As `count_kill`; 1 where the storage does not answer in time: a disk that hangs must not hold up its caller."""
    kills = [1]
    thread = threading.Thread(target=lambda: kills.append(count_kill(workdir)), name="kills", daemon=True)
    thread.start()
    thread.join(seconds)
    return kills[-1]


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
    # In a bucket, a step that is saved again has a folder STEP-2, and folders without a manifest are none yet.
    named = re.compile(r"(\d+)(-\d+)?" if is_remote(workdir) else r"(\d+)", re.ASCII)
    children = folder.iterdir() if folder.is_dir() else []
    found = [(match, child) for child in children if (match := named.fullmatch(child.name))]
    for match, child in sorted(found, key=lambda one: -int(one[0][1])):
        if not is_remote(workdir) or ((child / _MANIFEST).exists() and not (child / _SET_ASIDE).exists()):
            return int(match[1])
    return 0
