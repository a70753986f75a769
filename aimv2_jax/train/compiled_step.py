"""The train step compiled for one batch shape, with the transfer of its batches to the devices."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from functools import cached_property
from typing import Any

import jax
import numpy as np

from aimv2_jax.config.schema import BatchShape
from aimv2_jax.data import pipeline
from aimv2_jax.monitoring.events import EventKind, EventLog
from aimv2_jax.monitoring.flops import flops_per_example
from aimv2_jax.monitoring.log import logger
from aimv2_jax.train.builder import TrainSetup


@dataclasses.dataclass(frozen=True)
class CompiledStep:
    """The train step for batches of one shape.

    Attributes:
      setup: the config on its mesh.
      shape: of the batches.
      rows: of each batch that this process holds.
      run: (state, batch, rng) -> (state, metrics); donates the old state.
    """

    setup: TrainSetup
    shape: BatchShape
    rows: np.ndarray
    run: Callable[..., Any]

    @cached_property
    def flops(self) -> float:
        """Model FLOPs of a batch."""
        return flops_per_example(self.setup.config, self.shape.patches) * self.shape.examples

    def transfer(self, host: pipeline.HostBatch) -> tuple[dict[str, jax.Array], list[jax.Array]]:
        """Transfers a batch to the devices; returns the arrays of the step, and those for `ExampleCounter.add`."""
        batch = pipeline.to_devices(host.arrays, self.setup.batch_sharding, self.rows, self.shape.examples)
        return batch, [batch.pop(name) for name in pipeline.BOOKKEEPING]


def compile_step(setup: TrainSetup, shape: BatchShape) -> CompiledStep:
    """Compiles the train step for batches of `shape`."""
    what = f" for {shape.examples:,} images of {shape.patches:,} patches" if setup.config.data.areas else ""
    logger.info(f"compiling the train step{what} ...")
    return CompiledStep(setup, shape, setup.local_rows(shape.examples), setup.compile_step(shape))


def compile_steps(setup: TrainSetup, events: EventLog, step: int) -> dict[BatchShape, CompiledStep]:
    """Compiles the train step for all batch shapes of the config; writes an event for each, at `step`."""
    programs = {}
    for shape in setup.config.batch_shapes:
        begin_s = time.monotonic()
        programs[shape] = compile_step(setup, shape)
        events.write(EventKind.COMPILED, step, seconds=round(time.monotonic() - begin_s, 3))
    return programs
