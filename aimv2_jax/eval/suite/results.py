"""Results of a suite on disk: a file for each probe of each set, written when it is finished."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from aimv2_jax.errors import UserError
from aimv2_jax.storage.files import atomic_write
from aimv2_jax.untrusted import parse_json_object, read_file

_RUN_FILE = "run.json"
_FOLDER = "sets"
_MAX_BYTES = 64 << 20


class Results:
    """The results in a folder, which belong to one encoder and one choice of settings.

    Args:
      folder: the folder, which exists.
      run: what the results depend on apart from the datasets.

    Raises:
      UserError: if the folder has results of another run, or its files cannot be understood.
    """

    def __init__(self, folder: Path, run: Mapping[str, Any]):
        self.folder = folder
        file, text = folder / _RUN_FILE, _json(run)
        if file.exists():
            before = _read(file)
            changed = [key for key in run if before.get(key) != json.loads(text)[key]]
            if changed:
                what = f"--output has results of another {' and other '.join(changed)}"
                raise UserError(what, str(folder), "Give another folder, or the same checkpoint and flags")
        else:
            atomic_write(file, text.encode())

    def read(self, name: str, probe: str, identity: str) -> dict[str, Any] | None:
        """The finished result of a probe on the set `name`, or None if there is none of these datasets."""
        file = self._file(name, probe)
        tree = _read(file) if file.exists() else {}
        return tree["result"] if tree.get("identity") == identity else None

    def write(self, name: str, probe: str, identity: str, result: Mapping[str, Any]) -> None:
        """Stores a finished result; it is there as a whole or not at all."""
        file = self._file(name, probe)
        file.parent.mkdir(parents=True, exist_ok=True)
        atomic_write(file, _json({"identity": identity, "result": result}).encode())

    def _file(self, name: str, probe: str) -> Path:
        return self.folder / _FOLDER / name / f"{probe}.json"


def _json(tree: Mapping[str, Any]) -> str:
    return json.dumps(tree, indent=1, allow_nan=False) + "\n"


def _read(file: Path) -> dict[str, Any]:
    try:
        return parse_json_object(read_file(file, _MAX_BYTES))
    except ValueError as error:
        raise UserError(
            f"a result cannot be read: {error}", str(file), "Remove the file to compute it again"
        ) from error
