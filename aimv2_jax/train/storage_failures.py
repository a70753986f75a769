"""Whether data that cannot be read is an outage, which ends by itself, or a damaged file, which does not."""

from __future__ import annotations

import contextlib

from aimv2_jax.config import Config
from aimv2_jax.data import pipeline
from aimv2_jax.data.records import BadRecord
from aimv2_jax.data.sources import Source
from aimv2_jax.errors import EXIT_HUNG, StorageError, UserError
from aimv2_jax.train.interruptions import Interruptions


def storage_failure(
    error: StorageError, config: Config, step: int, examples: range, interruptions: Interruptions
) -> StorageError:
    """The error that ends a run at `step`, whose batch has `examples`.

    While nothing of a source can be read, waiting helps, however often the run is started meanwhile. Where the source
    can be read but for this file, it is recorded as a hang is: the second time at the same step ends with EXIT_HUNG.
    """
    try:
        sources = pipeline.open_sources(config.data.sources, patience_s=0.0)
    except (OSError, UserError):  # Not even dataset.json is there.
        return error
    if not all(map(_answers, sources.values())):
        return error
    code = interruptions.exit_code(step)
    told = f"{error}, though other records can be read"
    with contextlib.suppress(Exception):  # Of a bucket, TensorFlow's and fsspec's own kinds; the run ends anyway.
        interruptions.record(step, "storage", told.encode(errors="replace"))
    if code == EXIT_HUNG:
        skip = f"--skip_examples={examples.start}:{examples.stop}"
        told += f", as at step {step} before. Replace the file, or jump over the step's examples by {skip}"
    return StorageError(told, code)


def _answers(source: Source) -> bool:
    for index in (0, len(source) // 2, len(source) - 1):
        try:
            source.read(index)
            return True
        except BadRecord:
            return True  # It was read, and is damaged.
        except (StorageError, UserError):
            continue
    return False
