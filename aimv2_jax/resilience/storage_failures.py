"""Tells a storage outage, which ends by itself, from a damaged file, which does not."""

from __future__ import annotations

import contextlib
from collections.abc import Collection

from aimv2_jax.data.records import BadRecord
from aimv2_jax.data.sources import Source
from aimv2_jax.errors import EXIT_HUNG, StorageError, UserError
from aimv2_jax.resilience.repeated_failures import RepeatedFailures


def storage_failure(
    error: StorageError, sources: Collection[Source], step: int, examples: range, failures: RepeatedFailures
) -> StorageError:
    """Returns the error that ends a run at `step`, whose batch has `examples`.

    While no record of a source can be read, it is an outage, and restarts are not counted. Where other records can be
    read, the failure is recorded like a hang: the second one at the same step ends with EXIT_HUNG.
    """
    if not all(map(_is_readable, sources)):
        return error
    code = failures.exit_code(step)
    message = f"{error}, though other records can be read"
    with contextlib.suppress(OSError):
        failures.record(step, "storage", message.encode(errors="replace"))
    if code == EXIT_HUNG:
        skip = f"--skip_examples={examples.start}:{examples.stop}"
        message += f", as before at step {step}. Replace the file, or skip the step's examples by {skip}"
    return StorageError(message, code)


def _is_readable(source: Source) -> bool:
    """Whether the first, middle or last record can be read."""
    for index in (0, len(source) // 2, len(source) - 1):
        try:
            source.read(index, patience_s=0.0)
            return True
        except BadRecord:
            return True  # The record is damaged, but storage responds.
        except (StorageError, UserError):
            continue
    return False
