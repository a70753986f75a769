"""Batches for the training loop and for evaluation: read ahead in workers, tokenised in a thread, handed to devices.

The batch of a step is a function of (config, step): there is no position to save, and any step can be the first.

b rows of this process, B rows of the global batch, L patches, P numbers a patch, T text tokens, R reasons.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from aimv2_jax.config import Config, mixture_counts
from aimv2_jax.data.batches import (
    CenterView,
    EvaluationBatches,
    Fault,
    LocalBatch,
    NativeView,
    TrainingBatches,
    TrainingView,
    View,
    batch_bytes,
)
from aimv2_jax.data.noted import NotedReads, NotedSource
from aimv2_jax.data.plan import Plan
from aimv2_jax.data.prefetch import BOOKKEEPING, Batches, Failure, HostBatch, builders
from aimv2_jax.data.readahead import QUICK_S, ReadAhead
from aimv2_jax.data.records import REASONS
from aimv2_jax.data.skips import Skips
from aimv2_jax.data.sources import Source
from aimv2_jax.data.steps import Steps
from aimv2_jax.data.storage import PATIENCE_S, patience_s
from aimv2_jax.data.workers import check_shared_memory, cores
from aimv2_jax.errors import UserError
from aimv2_jax.untrusted import printable

if TYPE_CHECKING:
    import jax

    from aimv2_jax.data.tokenizer import Tokenizer

__all__ = [
    "BOOKKEEPING",
    "REASONS",
    "Batches",
    "Failure",
    "Fault",
    "HostBatch",
    "builders",
    "check_sources",
    "cores",
    "evaluation_batches",
    "open_sources",
    "to_devices",
    "training_batches",
    "training_plan",
]

_ENDLESS = 1 << 48  # Steps: more than any run has.


def open_sources(sources: Mapping[str, str], patience_s: float = PATIENCE_S) -> dict[str, Source]:
    """The sources of a config by name, in its order; raises as `Source`."""
    return {name: Source(name, path, patience_s=patience_s) for name, path in sources.items()}


def check_sources(config: Config) -> None:
    """Raises `UserError` unless all sources can be read and have the caption kinds that the config asks of them."""
    sources = open_sources(config.data.sources)
    for name, kinds in mixture_counts(config.data.mixture).items():
        for kind in kinds:
            if not sources[name].kinds.get(kind):
                raise UserError(
                    f"config data.mixture.{name} asks for captions of a kind that the data set lacks",
                    kind,
                    f"It has {_listed(sources[name].kinds)}",
                )
    held_out = open_sources(config.eval.sources)
    for kind in config.eval.kinds if held_out else ():
        if not any(source.kinds.get(kind) for source in held_out.values()):
            there = {kind for source in held_out.values() for kind in source.kinds}
            raise UserError(
                "config eval.kinds has a caption kind that no evaluation source has", kind, f"There is {_listed(there)}"
            )


def _listed(names: Any) -> str:
    return printable(", ".join(sorted(names))) or "none"


def training_plan(config: Config, sources: Mapping[str, Source]) -> Plan:
    """Which records are in which step of a run."""
    sizes = {name: len(source) for name, source in sources.items()}
    return Plan(config.seed, Steps(config.seed, config.batch_shapes), sizes, mixture_counts(config.data.mixture))


def training_batches(
    config: Config,
    rows_of: Callable[[int], Sequence[int] | np.ndarray],
    start_step: int,
    tokenizer: Tokenizer | None = None,
    skips: Skips | None = None,
    stall_s: float = 0.0,
    on_restart: Callable[[Failure], None] | None = None,
) -> Batches:
    """The batches of steps start_step, start_step + 1, … without end.

    Args:
      config: the run's config.
      rows_of: from the size of a global batch to those of its rows that this process holds, in the order in which it
        wants them; `range` for all.
      start_step: the first step.
      tokenizer: without one, `tokens` and `token_valid` are zero.
      skips: batches that no step has; `HostBatch.step` is the number of the batch.
      stall_s: after so long at one record, the workers are started again; 0: never. See `Batches`.
      on_restart: told of a worker that died or stalled, from a thread.

    Raises:
      UserError: if a source cannot be read, or shared memory is too small for the workers' batches.
      StorageError: by the batch, if storage fails for longer than a quarter of `watch.data_s`.
    """
    sources = open_sources(config.data.sources, patience_s(config.watch.data_s))
    data, patch_size = config.data, config.model.patch_size
    view: View = TrainingView(config.seed, data.image_size, data.crop_area, data.crop_ratio, data.flip)
    if data.areas:
        view = NativeView(config.seed, patch_size, data.upscale, data.flip)
    rows = {size: tuple(int(row) for row in rows_of(size)) for size in {one.examples for one in config.batch_shapes}}
    if data.workers:
        largest = max(batch_bytes(len(rows[one.examples]), one.patches, patch_size) for one in config.batch_shapes)
        check_shared_memory(largest, data.workers, data.prefetch)
    build = TrainingBatches(
        training_plan(config, sources),
        {name: NotedSource(source) for name, source in sources.items()},
        rows,
        view,
        patch_size,
        # Worker i of n builds every n-th batch. Threads of one process wait for one another: there no read is quick.
        NotedReads(ReadAhead(data.read_threads, data.workers or None, QUICK_S if data.workers else 0.0)),
    )
    tokenise = _Tokenise(tokenizer, config.model.decoder.text_length)
    steps = range(start_step, _ENDLESS)
    return Batches(_OfStep(build, skips or Skips()), steps, tokenise, data.workers, data.prefetch, stall_s, on_restart)


def evaluation_batches(
    config: Config, rows: Sequence[int] | np.ndarray, tokenizer: Tokenizer | None = None
) -> Iterator[tuple[str, HostBatch]]:
    """The held-out batches of each caption kind in turn, the same at every call; `step` counts the kind's batches.

    Each kind sees all records (the first `eval.max_examples`) of the sources that have it, numbered from 0. Unusable
    records and the tail of the last batch are rows whose `valid` and `token_valid` are all False.
    """
    sources = open_sources(config.eval.sources, patience_s(config.watch.data_s))
    limit, area, patch_size = config.eval.max_examples, config.eval.area, config.model.patch_size
    view: View = CenterView(config.data.image_size)
    if area is not None:
        view = NativeView(config.seed, patch_size, config.data.upscale)
    for kind in config.eval.kinds:
        counts = {name: len(source) for name, source in sources.items() if source.kinds.get(kind)}
        build = EvaluationBatches(
            {name: NotedSource(source) for name, source in sources.items()},
            tuple((name, count if limit is None else min(count, limit)) for name, count in counts.items()),
            kind,
            config.eval.batch_size,
            tuple(int(row) for row in rows),
            view,
            area or config.num_patches,
            patch_size,
            NotedReads(ReadAhead(config.data.read_threads)),
        )
        tokenise = _Tokenise(tokenizer, config.model.decoder.text_length)
        # In threads of this process: an evaluation is short, and starting workers for each would cost seconds.
        with Batches(build, range(len(build)), tokenise, workers=0, prefetch=config.data.prefetch) as batches:
            for batch in batches:
                yield kind, batch


@dataclasses.dataclass(frozen=True)
class _OfStep:
    """step -> this process' rows of the batch that it trains on."""

    build: Callable[[int], LocalBatch]
    skips: Skips

    def __call__(self, step: int) -> LocalBatch:
        return self.build(self.skips.batch(step))


@dataclasses.dataclass(frozen=True)
class _Tokenise:
    tokenizer: Tokenizer | None
    length: int

    def __call__(self, batch: LocalBatch) -> HostBatch:
        rows, seconds = len(batch.captions), batch.seconds
        shape = rows, self.length
        texts = {
            "tokens": np.zeros(shape, np.int32),
            "token_valid": np.zeros(shape, bool),
            "truncated": np.zeros(rows, bool),
        }
        if self.tokenizer is not None:
            start = time.perf_counter()
            texts = self.tokenizer.batch_arrays(batch.captions)
            seconds = seconds | {"tokenise": time.perf_counter() - start}
        arrays = batch.arrays | texts
        return HostBatch(batch.step, arrays, batch.faults, seconds)


def to_devices(
    arrays: Mapping[str, np.ndarray], sharding: jax.sharding.NamedSharding, rows: Sequence[int], global_rows: int
) -> dict[str, jax.Array]:
    """Global arrays of `global_rows` rows, of which this process gives `rows` (in the order of `arrays`).

    `sharding` splits the leading axis; every row that it puts on a device of this process must be among `rows`.
    """
    import jax

    place = np.full(global_rows, -1)
    place[np.asarray(rows)] = np.arange(len(rows))

    def globally(local: np.ndarray) -> jax.Array:
        def part(index: tuple[slice, ...]) -> np.ndarray:
            places = place[index[0]]
            assert (places >= 0).all(), "a device's rows were not read by its process"
            return local[(places, *index[1:])]

        return jax.make_array_from_callback((global_rows, *local.shape[1:]), sharding, part)

    with jax.transfer_guard("allow"):  # The one place where a batch crosses over, so this transfer is meant.
        return {name: globally(array) for name, array in arrays.items()}
