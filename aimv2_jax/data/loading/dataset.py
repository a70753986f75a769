"""The batches of a run as a Grain dataset, which threads and worker processes read by position."""

from __future__ import annotations

from collections.abc import Callable

import grain
from absl import flags

from aimv2_jax.data.loading.batch_builder import LocalBatch
from aimv2_jax.data.loading.worker_status import WorkerStatus

Build = Callable[[int, WorkerStatus], LocalBatch]
"""(number, status of this process) -> that batch; it reports to the status what each thread reads and builds."""


def batch_dataset(build: Build, numbers: range, status: WorkerStatus) -> grain.MapDataset[LocalBatch]:
    """The batches `numbers` in order. Any position can be read: a batch is a function of its number alone."""
    if not flags.FLAGS.is_parsed():  # Grain reads absl flags, which only `app.run` parses.
        flags.FLAGS.mark_as_parsed()
    return grain.MapDataset.range(numbers.start, numbers.stop, numbers.step).map(lambda number: build(number, status))
