"""Records of steps with a non-finite loss or gradient: `WORKDIR/nonfinite/STEP.json`, for `--replay STEP`."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

from etils import epath

from aimv2_jax.storage.files import atomic_write

_FOLDER = "nonfinite"


def write_record(workdir: epath.PathLike, step: int, record: Mapping[str, Any], metrics: Mapping[str, float]) -> str:
    """Writes `step`, the items of `record` and the metrics of a step as JSON; returns the path."""
    path = epath.Path(workdir) / _FOLDER / f"{step}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    # JSON has no NaN, so values that are not finite are written as text.
    plain = {name: value if math.isfinite(value) else str(value) for name, value in metrics.items()}
    atomic_write(path, (json.dumps({"step": step, **record, "metrics": plain}, indent=1) + "\n").encode())
    return str(path)


def read_record(workdir: epath.PathLike, step: int) -> dict[str, Any] | None:
    """Reads the record of a step, with its metrics as floats; None if there is none."""
    path = epath.Path(workdir) / _FOLDER / f"{step}.json"
    if not path.exists():
        return None
    record = json.loads(path.read_text())
    return record | {"metrics": {name: float(value) for name, value in record["metrics"].items()}}
