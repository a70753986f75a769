"""Features of examples, computed once and kept on disk. N pictures, V views, L patches, D width."""

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

from aimv2_jax.data.workers import cores
from aimv2_jax.errors import UserError
from aimv2_jax.eval.encoders import LoadedEncoder
from aimv2_jax.eval.probes.examples import Examples

Pooling = Literal["patches", "mean"]
T = TypeVar("T")
_STORED = np.float16  # Rounds by 2^-11: far below what a probe can tell.
_VERSION = 2  # To be raised with any change of what features are, so that kept ones are not taken for new ones.
_MOST_OF_MEMORY = 0.7  # That all features of a set may take.
_AHEAD = 2  # Batches that are decoded ahead of the encoder, by a thread a core.


@dataclasses.dataclass(frozen=True)
class FeatureSet:
    """`features` [N, V, L, D] (L = 1 where they are means) and which of them are patches: `valid` [N, L].

    `seconds` is what making them took, and of that the time in the encoder; zeros where they lay on disk.
    """

    features: Float[np.ndarray, "N V L D"]
    valid: Bool[np.ndarray, "N L"]
    seconds: tuple[float, float] = (0.0, 0.0)


@dataclasses.dataclass(frozen=True)
class FeatureCache:
    """What an encoder makes of examples: of the crop that evaluation takes, and where `flips` of it mirrored, too.

    Args:
      folder: where features are kept, by (model, data, transform); None: nowhere.
      encoder: the frozen encoder.
      pooling: keep all patches, or their mean.
      layer: after which block, or None: after the final norm.
      flips: keep the mirrored picture, too.
      batch_size: pictures at a time.
    """

    folder: Path | None
    encoder: LoadedEncoder
    pooling: Pooling
    layer: int | None
    flips: bool
    batch_size: int

    def __call__(self, examples: Examples, what: str) -> FeatureSet:
        """Those of `examples`, `what` for the progress bar."""
        path = self.folder / f"{self._key(examples)}.npz" if self.folder is not None else None
        if path is not None and path.is_file():
            with np.load(path) as kept:
                return FeatureSet(kept["features"], kept["valid"])
        made = self._make(examples, what)
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            unfinished = path.with_suffix(f".{os.getpid()}.part")
            with unfinished.open("wb") as file:
                np.savez(file, features=made.features, valid=made.valid)
            unfinished.rename(path)
        return made

    def _key(self, examples: Examples) -> str:
        transform = [_VERSION, self.pooling, self.layer, self.flips, self.encoder.dtype]
        content = [self.encoder.digest, examples.digest, transform]
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:32]

    def _make(self, examples: Examples, what: str) -> FeatureSet:
        views = 1 + self.flips
        length = 1 if self.pooling == "mean" else self.encoder.num_patches
        shape = (len(examples), views, length, self.encoder.vision.width)
        _check_memory(math.prod(shape) * np.dtype(_STORED).itemsize, what)
        features = np.zeros(shape, _STORED)
        valid = np.zeros((len(examples), length), bool)
        self.encode([self.encoder.pixels(examples.image(0))])  # Compiles: that is no part of the clock.
        start, inside = time.perf_counter(), 0.0
        count = -(-len(examples) // self.batch_size)
        for first, pixels in tqdm(self._pixels(examples), total=count, desc=what, unit="batch"):
            rows = slice(first, first + len(pixels))
            for view in range(views):
                seen = [picture[:, ::-1] for picture in pixels] if view else pixels
                features[rows, view], valid[rows], seconds = self.encode(seen)
                inside += seconds
        return FeatureSet(features, valid, (time.perf_counter() - start, inside))

    def stream(self, examples: Examples) -> Iterator[tuple[Float[np.ndarray, "B L D"], Bool[np.ndarray, "B L"]]]:
        """Features of the crop that evaluation takes, a batch at a time: for sets that are too large to keep."""
        for _, pixels in self._pixels(examples):
            features, valid, _ = self.encode(pixels)
            yield features, valid

    def encode(self, pixels: Sequence[np.ndarray]) -> tuple[Float[np.ndarray, "B L D"], Bool[np.ndarray, "B L"], float]:
        """Features of at most a batch of pictures as the encoder sees them, and the seconds in it."""
        batch, _ = self.encoder.batch(pixels, self.batch_size)
        start = time.perf_counter()
        found, valid = self.encoder.features(**batch, layer=self.layer), batch["valid"]
        if self.pooling == "mean":
            found, valid = mean_of_patches(found, valid), valid[:, :1]
        found, valid = (np.asarray(one)[: len(pixels)] for one in (found, valid))
        with np.errstate(over="ignore"):
            stored = found.astype(_STORED)
        if not np.isfinite(stored).all():
            remedy = (
                "Give another --layer"
                if np.isfinite(found).all()
                else "The model is broken: try --weights or another step"
            )
            raise UserError("features are too large to be kept, or not finite", float(np.abs(found).max()), remedy)
        return stored, valid, time.perf_counter() - start

    def _pixels(self, examples: Examples) -> Iterator[tuple[int, list[np.ndarray]]]:
        """(place of the first, pictures as the encoder sees them) of each batch, decoded ahead."""
        starts = range(0, len(examples), self.batch_size)
        batches = [range(start, min(start + self.batch_size, len(examples))) for start in starts]
        return zip(starts, made_ahead(lambda place: self.encoder.pixels(examples.image(place)), batches))


def made_ahead(make: Callable[[T], np.ndarray], groups: Iterable[Iterable[T]]) -> Iterator[list[np.ndarray]]:
    """`make` of all in each group, in order, some groups ahead."""
    with concurrent.futures.ThreadPoolExecutor(cores()) as pool:
        waiting: collections.deque[list[concurrent.futures.Future]] = collections.deque()
        try:
            for group in groups:
                waiting.append([pool.submit(make, one) for one in group])
                if len(waiting) > _AHEAD:
                    yield [future.result() for future in waiting.popleft()]
            while waiting:
                yield [future.result() for future in waiting.popleft()]
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def _check_memory(num_bytes: int, what: str) -> None:
    whole = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if num_bytes > _MOST_OF_MEMORY * whole:
        raise UserError(
            f"features of all {what} pictures do not fit into memory",
            f"{num_bytes / 2**30:.0f} GiB of {whole / 2**30:.0f}",
            "Give --augment crops, which keeps none, or --kind linear, which keeps their mean",
        )


@jax.jit
def mean_of_patches(features: jax.Array, valid: jax.Array) -> jax.Array:
    """[B, 1, D]: the mean of the valid patches of [B, L, D]."""
    weights = valid[..., None].astype(features.dtype)
    return (features * weights).sum(1, keepdims=True) / weights.sum(1, keepdims=True).clip(1)
