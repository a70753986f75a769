"""Records of steps with a non-finite loss or gradient: `WORKDIR/nonfinite/STEP.json`, for `--replay STEP`."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

import jax
from etils import epath

from aimv2_jax.monitoring.log import logger
from aimv2_jax.storage.files import atomic_write, make_parent, read_bytes

_FOLDER = "nonfinite"


def write_record(
    workdir: epath.PathLike, step: int, record: Mapping[str, Any], metrics: Mapping[str, float]
) -> str | None:
    """Writes `step`, the items of `record` and the metrics of a step as JSON, on process 0.

    Returns:
      The path; None on other processes, and where it could not be written, which is logged.
    """
    if jax.process_index() != 0:
        return None
    path = epath.Path(workdir) / _FOLDER / f"{step}.json"
    # JSON has no NaN, so values that are not finite are written as text.
    plain = {name: value if math.isfinite(value) else str(value) for name, value in metrics.items()}
    text = json.dumps({"step": step, **record, "metrics": plain}, indent=1) + "\n"
    try:
        make_parent(path)
        atomic_write(path, text.encode())
    except OSError as error:
        logger.info(f"the record of step {step} could not be written: {error}")
        return None
    return str(path)


def read_record(workdir: epath.PathLike, step: int) -> dict[str, Any] | None:
    """Reads the record of a step, with its metrics as floats; None if there is none."""
    path = epath.Path(workdir) / _FOLDER / f"{step}.json"
    try:
        record = json.loads(read_bytes(path))
    except FileNotFoundError:
        return None
    return record | {"metrics": {name: float(value) for name, value in record["metrics"].items()}}
