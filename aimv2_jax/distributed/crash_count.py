"""Number of times a run's trainers were killed since its newest checkpoint, by the OOM killer or a crash in C.

A restart helps after an accident. Without this count, a run that is always killed before its next checkpoint would be
restarted forever.
"""

from __future__ import annotations

import contextlib
import json
import re
import threading

from etils import epath

from aimv2_jax.storage.files import atomic_write, is_remote, list_names, list_objects, read_bytes
from aimv2_jax.untrusted import as_int, parse_json_object

MAX_KILLS = 3  # Kills without a new checkpoint between the first and the last.
FILE = "kills.json"
# Copies of names in checkpoint/layout.py and manifest.py, which need jax.
_CHECKPOINTS, _MANIFEST, _SET_ASIDE = "checkpoints", "manifest.json", "set_aside.json"
_MAX_COUNT = 1_000_000
_STORAGE_TIMEOUT_S = 5.0


def count_kill_within(workdir: epath.PathLike, seconds: float = _STORAGE_TIMEOUT_S) -> int:
    """`count_kill` with a timeout; returns 1 if the storage hangs, so that it cannot block the caller."""
    kills = [1]
    thread = threading.Thread(target=lambda: kills.append(count_kill(workdir)), name="kills", daemon=True)
    thread.start()
    thread.join(seconds)
    return kills[-1]


def count_kill(workdir: epath.PathLike) -> int:
    """Counts one kill and returns the kills since the newest checkpoint; 1 if the workdir cannot be read."""
    kills = 1
    with contextlib.suppress(OSError):
        newest = _newest_step(workdir)
        kills += _kills_since(workdir, newest)
        content = {"newest_step": newest, "kills": kills}
        atomic_write(epath.Path(workdir) / FILE, json.dumps(content).encode() + b"\n")
    return kills


def _kills_since(workdir: epath.PathLike, newest: int) -> int:
    """Kills that were counted at the same newest step."""
    try:
        content = parse_json_object(read_bytes(epath.Path(workdir) / FILE))
        return as_int(content.get("kills"), 0, _MAX_COUNT) if content.get("newest_step") == newest else 0
    except (FileNotFoundError, ValueError):  # ValueError: the file is damaged.
        return 0


def _newest_step(workdir: epath.PathLike) -> int:
    folder = epath.Path(workdir) / _CHECKPOINTS
    if not is_remote(workdir):
        return max((int(name) for name in list_names(folder) if re.fullmatch(r"\d+", name, re.ASCII)), default=0)
    # A step that is saved again has a folder STEP-2, and a folder without a manifest is unfinished.
    found = list_objects(folder)
    manifests = (match for name in found if (match := re.fullmatch(rf"((\d+)(-\d+)?)/{_MANIFEST}", name, re.ASCII)))
    return max((int(match[2]) for match in manifests if f"{match[1]}/{_SET_ASIDE}" not in found), default=0)
