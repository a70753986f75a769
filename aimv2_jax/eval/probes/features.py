"""Features of a labelled dataset, computed once and cached on disk. N images, V views, L patches, D width."""

from __future__ import annotations

import collections
import concurrent.futures
import dataclasses
import hashlib
import json
import math
import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Literal, TypeVar

import jax
import numpy as np
from jaxtyping import Bool, Float
from tqdm import tqdm

from aimv2_jax.data.loading.workers import cores
from aimv2_jax.errors import UserError
from aimv2_jax.eval.probes.dataset import LabelledDataset
from aimv2_jax.pretrained.encoder import Pixels, PretrainedEncoder, mirrored

Pooling = Literal["patches", "mean"]
T, U = TypeVar("T"), TypeVar("U")
_STORED_DTYPE = np.float16  # Its rounding of 2^-11 is far below what changes a probe's accuracy.
_CACHE_VERSION = 2  # Must grow with any change of the features, so that old files are not read as new ones.
_MAX_MEMORY_SHARE = 0.7  # Largest share of the machine's memory for the features of one dataset.
_PREFETCH = 2  # Batches decoded ahead of the encoder, by one thread per core.


@dataclasses.dataclass(frozen=True)
class FeatureSet:
    """`features` [N, V, L, D] (L = 1 for means) and their mask `valid` [N, L]; padding patches are False.

    `seconds` is (total time to compute them, part of it in the encoder), or zeros when they were read from disk.
    """

    features: Float[np.ndarray, "N V L D"]
    valid: Bool[np.ndarray, "N L"]
    seconds: tuple[float, float] = (0.0, 0.0)

    def means(self) -> FeatureSet:
        """The mean of the patches of each image (L = 1), from features of all patches, in no time."""
        means = np.empty((*self.features.shape[:2], 1, self.features.shape[-1]), self.features.dtype)
        for row, (patches, valid) in enumerate(zip(self.features, self.valid)):
            means[row] = patches[:, valid].mean(1, dtype=np.float32, keepdims=True)
        return FeatureSet(means, self.valid.any(1, keepdims=True))


@dataclasses.dataclass(frozen=True)
class FeatureCache:
    """Computes and caches an encoder's features of the evaluation crop, and of its mirror image with `flips`.

    Args:
      folder: cache folder, with files keyed by (model, data, transform); None: no cache.
      encoder: the frozen encoder.
      pooling: keep all patches, or their mean.
      layer: the block whose output is taken; None: after the final norm.
      flips: also store the mirrored image.
      batch_size: images per batch.
    """

    folder: Path | None
    encoder: PretrainedEncoder
    pooling: Pooling
    layer: int | None
    flips: bool
    batch_size: int

    def __call__(self, dataset: LabelledDataset, title: str) -> FeatureSet:
        """The features of `dataset`, read from the cache or computed; `title` labels the progress bar."""
        path = self.folder / f"{self._key(dataset)}.npz" if self.folder is not None else None
        if path is not None and path.is_file():
            with np.load(path) as cached:
                return FeatureSet(cached["features"], cached["valid"])
        computed = self._compute(dataset, title)
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            unfinished = path.with_suffix(f".{os.getpid()}.part")
            with unfinished.open("wb") as file:
                np.savez(file, features=computed.features, valid=computed.valid)
            unfinished.rename(path)
        return computed

    def _key(self, dataset: LabelledDataset) -> str:
        transform = [_CACHE_VERSION, self.pooling, self.layer, self.flips, self.encoder.dtype]
        content = [self.encoder.digest, dataset.digest, transform]
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:32]

    def _compute(self, dataset: LabelledDataset, title: str) -> FeatureSet:
        views = 1 + self.flips
        length = 1 if self.pooling == "mean" else self.encoder.num_patches
        shape = (len(dataset), views, length, self.encoder.spec.width)
        _check_memory(math.prod(shape) * np.dtype(_STORED_DTYPE).itemsize, title)
        features = np.zeros(shape, _STORED_DTYPE)
        valid = np.zeros((len(dataset), length), bool)
        self.encode([self.encoder.decoded(dataset.image(0))])  # Compiles before the clock starts.
        start, encoder_s = time.perf_counter(), 0.0
        count = -(-len(dataset) // self.batch_size)
        for first, pixels in tqdm(self._pixels(dataset), total=count, desc=title, unit="batch"):
            rows = slice(first, first + len(pixels))
            for view in range(views):
                view_pixels = [mirrored(image) for image in pixels] if view else pixels
                features[rows, view], valid[rows], seconds = self.encode(view_pixels)
                encoder_s += seconds
        return FeatureSet(features, valid, (time.perf_counter() - start, encoder_s))

    def stream(self, dataset: LabelledDataset) -> Iterator[tuple[Float[np.ndarray, "B L D"], Bool[np.ndarray, "B L"]]]:
        """Yields features of the evaluation crop a batch at a time, for datasets too large to keep in memory."""
        for _, pixels in self._pixels(dataset):
            features, valid, _ = self.encode(pixels)
            yield features, valid

    def encode(self, pixels: Sequence[Pixels]) -> tuple[Float[np.ndarray, "B L D"], Bool[np.ndarray, "B L"], float]:
        """Features of at most a batch of images of `PretrainedEncoder.decoded`, their mask, and the seconds it took."""
        batch, _ = self.encoder.batch(pixels, self.batch_size)
        start = time.perf_counter()
        features, valid = self.encoder.features(**batch, layer=self.layer), batch["valid"]
        if self.pooling == "mean":
            features, valid = mean_of_patches(features, valid), valid[:, :1]
        features, valid = (np.asarray(array)[: len(pixels)] for array in (features, valid))
        with np.errstate(over="ignore"):
            stored = features.astype(_STORED_DTYPE)
        if not np.isfinite(stored).all():
            remedy = (
                "Give another --layer"
                if np.isfinite(features).all()
                else "The model is broken: try --weights or another step"
            )
            what = "features are too large to be stored as float16, or not finite"
            raise UserError(what, float(np.abs(features).max()), remedy)
        return stored, valid, time.perf_counter() - start

    def _pixels(self, dataset: LabelledDataset) -> Iterator[tuple[int, list[Pixels]]]:
        """(index of the first image, images of `PretrainedEncoder.decoded`) of each batch, decoded ahead."""
        starts = range(0, len(dataset), self.batch_size)
        batches = [range(start, min(start + self.batch_size, len(dataset))) for start in starts]
        return zip(starts, prefetch_map(lambda index: self.encoder.decoded(dataset.image(index)), batches))


def prefetch_map(function: Callable[[T], U], groups: Iterable[Iterable[T]]) -> Iterator[list[U]]:
    """Yields [function(item), …] for each group in order, computed in threads a few groups ahead."""
    with concurrent.futures.ThreadPoolExecutor(cores()) as pool:
        waiting: collections.deque[list[concurrent.futures.Future]] = collections.deque()
        try:
            for group in groups:
                waiting.append([pool.submit(function, item) for item in group])
                if len(waiting) > _PREFETCH:
                    yield [future.result() for future in waiting.popleft()]
            while waiting:
                yield [future.result() for future in waiting.popleft()]
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def _check_memory(num_bytes: int, title: str) -> None:
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if num_bytes > _MAX_MEMORY_SHARE * total:
        raise UserError(
            f"features of all {title} images do not fit into memory",
            f"{num_bytes / 2**30:.0f} GiB of {total / 2**30:.0f}",
            "Give --augment crops, which stores none, or --kind linear, which stores their mean",
        )


@jax.jit
def mean_of_patches(features: jax.Array, valid: jax.Array) -> jax.Array:
    """[B, 1, D]: the mean of the valid patches of [B, L, D]."""
    weights = valid[..., None].astype(features.dtype)
    return (features * weights).sum(1, keepdims=True) / weights.sum(1, keepdims=True).clip(1)
