"""Input pipeline for training and evaluation: built in workers, tokenised in a thread, transferred to devices.

The batch of a step is a function of (config, step): there is no position to save, and any step can be the first.

b rows of this process, B rows of the global batch, L patches, P values per patch, T text tokens, R reasons.
"""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from aimv2_jax.config.schema import Config, mixture_counts
from aimv2_jax.data.loading.batch_builder import BadExample, EvaluationBatches, LocalBatch, TrainingBatches
from aimv2_jax.data.loading.batch_iterator import BOOKKEEPING, BatchIterator, HostBatch
from aimv2_jax.data.loading.pools import WorkerFailure, builders
from aimv2_jax.data.loading.read_ahead import QUICK_S, ReadAhead
from aimv2_jax.data.loading.worker_status import WorkerStatus
from aimv2_jax.data.loading.workers import cores
from aimv2_jax.data.records import REASONS
from aimv2_jax.data.sampling.mixture import MixtureSampler
from aimv2_jax.data.sampling.schedule import BatchSchedule
from aimv2_jax.data.sampling.skips import Skips
from aimv2_jax.data.sources import Source, open_datasets
from aimv2_jax.data.transforms.views import RandomCrop, RandomFlip, Size, View, evaluation_view
from aimv2_jax.errors import UserError
from aimv2_jax.storage.host_cache import HostCache
from aimv2_jax.storage.retries import patience_s
from aimv2_jax.untrusted import printable

if TYPE_CHECKING:
    import jax

    from aimv2_jax.data.tokenizer import Tokenizer

__all__ = [
    "BOOKKEEPING",
    "REASONS",
    "BadExample",
    "BatchIterator",
    "HostBatch",
    "Sources",
    "WorkerFailure",
    "builders",
    "cores",
    "evaluation_batches",
    "open_sources",
    "to_devices",
    "training_batches",
    "training_sampler",
]

_MAX_STEPS = 1 << 48  # More steps than any run has.


@dataclasses.dataclass(frozen=True)
class Sources:
    """The open sources of a run by name, in the config's order: for training, and held out for evaluation."""

    training: Mapping[str, Source]
    held_out: Mapping[str, Source]


def open_sources(config: Config) -> Sources:
    """Opens all sources of a run, once a start.

    Raises:
      UserError: unless all can be read and have the caption kinds that the config requires.
      StorageError: if storage fails for longer than a quarter of `watch.data_s`.
    """
    training = _open(config, config.data.sources)
    for name, kinds in mixture_counts(config.data.mixture).items():
        for kind in kinds:
            if not training[name].kinds.get(kind):
                raise UserError(
                    f"config data.mixture.{name} asks for captions of a kind that the dataset lacks",
                    kind,
                    f"It has {_join_names(training[name].kinds)}",
                )
    held_out = _open(config, config.eval.sources)
    for kind in config.eval.caption_types if held_out else ():
        if not any(source.kinds.get(kind) for source in held_out.values()):
            available = {kind for source in held_out.values() for kind in source.kinds}
            raise UserError(
                "config eval.caption_types has a caption kind that no evaluation source has",
                kind,
                f"There is {_join_names(available)}",
            )
    return Sources(training, held_out)


def _open(config: Config, paths: Mapping[str, str]) -> dict[str, Source]:
    cache = HostCache(config.data.cache_dir, int(config.data.cache_gb * 1e9))
    return open_datasets(paths, patience_s(config.watch.data_s), cache)


def _join_names(names: Any) -> str:
    return printable(", ".join(sorted(names))) or "none"


def training_sampler(config: Config, sources: Mapping[str, Source]) -> MixtureSampler:
    """The mixture sampler of a run."""
    sizes = {name: len(source) for name, source in sources.items()}
    return MixtureSampler(
        config.seed, BatchSchedule(config.seed, config.batch_shapes), sizes, mixture_counts(config.data.mixture)
    )


def training_batches(
    config: Config,
    rows_of: Callable[[int], Sequence[int] | np.ndarray],
    start_step: int,
    tokenizer: Tokenizer | None = None,
    skips: Skips | None = None,
    stall_s: float = 0.0,
    on_restart: Callable[[WorkerFailure], None] | None = None,
    sources: Mapping[str, Source] | None = None,
) -> BatchIterator:
    """The batches of steps start_step, start_step + 1, … without end.

    Args:
      config: the run's config.
      rows_of: size of a global batch -> the rows of it that this process holds, in the order in which it wants them;
        `range` for all.
      start_step: the first step.
      tokenizer: without one, `tokens` and `token_valid` are zero.
      skips: batches that no step trains on; `HostBatch.step` is the number of the batch.
      stall_s: the workers restart after this long at one record; 0: never. See `BatchIterator`.
      on_restart: called, from a thread, when a worker died or stalled.
      sources: the open training sources; by default they are opened here.

    Raises:
      UserError: if a source cannot be read.
      StorageError: in place of a batch, if storage fails for longer than a quarter of `watch.data_s`.
    """
    sources = sources or _open(config, config.data.sources)
    data, patch_size, shapes = config.data, config.model.patch_size, config.batch_shapes
    crop = RandomCrop(config.seed, data.image_size, data.crop_area, data.crop_ratio, data.flip)
    views: dict[int, Callable[[Size, int], View]] = {shape.patches: crop for shape in shapes}
    if data.areas:
        views = {area: RandomFlip(config.seed, patch_size, area, data.upscale, data.flip) for area in views}
    build = TrainingBatches(
        training_sampler(config, sources),
        sources,
        rows={size: tuple(int(row) for row in rows_of(size)) for size in {shape.examples for shape in shapes}},
        views=views,
        patch_size=patch_size,
        teacher_size=config.teacher_image_size,
        # Worker i of n builds every n-th batch. Threads of one process contend for the GIL, so no read counts as quick.
        read_ahead=ReadAhead(data.read_threads, data.workers or None, QUICK_S if data.workers else 0.0),
    )
    tokenise = _Tokenise(tokenizer, config.text.text_length)
    steps = range(start_step, _MAX_STEPS)
    return BatchIterator(
        _BuildStep(build, skips or Skips()),
        steps,
        tokenise,
        workers=data.workers,
        prefetch=data.prefetch,
        stall_s=stall_s,
        on_restart=on_restart,
    )


def evaluation_batches(
    config: Config,
    rows: Sequence[int] | np.ndarray,
    tokenizer: Tokenizer | None = None,
    sources: Mapping[str, Source] | None = None,
) -> Iterator[tuple[str, HostBatch]]:
    """The held-out batches of each caption kind in turn, the same at every call; `step` counts batches per kind.

    Each kind covers all records (the first `eval.max_examples`) of the sources that have it, numbered from 0. Unusable
    records and the tail of the last batch are padding rows whose `valid` and `token_valid` are all False. `sources` are
    the open held-out sources; by default they are opened here.
    """
    if sources is None:
        sources = _open(config, config.eval.sources)
    limit, area, patch_size = config.eval.max_examples, config.eval.area, config.model.patch_size
    view = functools.partial(
        evaluation_view,
        size=config.data.image_size,
        patch_size=patch_size,
        area=area,
        upscale=config.data.upscale,
    )
    for kind in config.eval.caption_types:
        counts = {name: len(source) for name, source in sources.items() if source.kinds.get(kind)}
        build = EvaluationBatches(
            sources,
            tuple((name, count if limit is None else min(count, limit)) for name, count in counts.items()),
            kind,
            batch_size=config.eval.batch_size,
            rows=tuple(int(row) for row in rows),
            view=view,
            num_patches=area or config.num_patches,
            patch_size=patch_size,
            teacher_size=config.teacher_image_size,
            read_ahead=ReadAhead(config.data.read_threads),
        )
        tokenise = _Tokenise(tokenizer, config.text.text_length)
        # Built by threads of this process: an evaluation is short, and starting workers would take seconds each time.
        with BatchIterator(build, range(len(build)), tokenise, workers=0, prefetch=config.data.prefetch) as batches:
            for batch in batches:
                yield kind, batch


@dataclasses.dataclass(frozen=True)
class _BuildStep:
    """step -> this process's rows of the batch that it trains on."""

    build: TrainingBatches
    skips: Skips

    def __call__(self, step: int, status: WorkerStatus) -> LocalBatch:
        return self.build(self.skips.batch(step), status)


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
    """Global arrays of `global_rows` rows, of which this process has `rows` (in the order of `arrays`).

    `sharding` splits the leading axis; every row that it assigns to a device of this process must be among `rows`.
    """
    import jax

    local_index = np.full(global_rows, -1)
    local_index[np.asarray(rows)] = np.arange(len(rows))

    def to_global(local: np.ndarray) -> jax.Array:
        def shard_data(index: tuple[slice, ...]) -> np.ndarray:
            indices = local_index[index[0]]
            assert (indices >= 0).all(), "a device's rows were not read by its process"
            return local[(indices, *index[1:])]

        return jax.make_array_from_callback((global_rows, *local.shape[1:]), sharding, shard_data)

    with jax.transfer_guard("allow"):  # The only intended host-to-device transfer of batches.
        return {name: to_global(array) for name, array in arrays.items()}
