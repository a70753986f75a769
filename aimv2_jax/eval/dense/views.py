"""Windows of images and their maps as batches of arrays. Numpy and Pillow.

B batch, L patches, P values of a patch, H and W pixels, R x C patches of the largest window.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from jaxtyping import UInt8

from aimv2_jax.data.sampling.counter_rng import example_rng
from aimv2_jax.data.transforms.geometry import patch_coords, patchify
from aimv2_jax.data.transforms.views import View
from aimv2_jax.eval.dense.dataset import IGNORED, DenseDataset
from aimv2_jax.eval.dense.features import DenseEncoder, whole_image_grid
from aimv2_jax.eval.dense.settings import DenseConfig
from aimv2_jax.eval.dense.windows import Window, box_of, scaled_size, side_at
from aimv2_jax.eval.probes.features import prefetch_map
from aimv2_jax.pretrained.device_resize import pack
from aimv2_jax.pretrained.encoder import Pixels
from aimv2_jax.pretrained.images import OpenedImage

_TRIES = 10  # Crops that `max_class_share` draws at most.
_SAMPLED = 4  # Every fourth row and column of a crop estimates the share of a class.

Batch = dict[str, Any]
"""patches [B L P] uint8 or, for the devices to resize, `unresized` (`device_resize.pack`); coords [B L 2],
valid [B L], grids [B 2] (rows and columns of each window), and for training truth [B R·p C·p]: classes as uint8 (255
does not count) or depths as float32 (0 does not count)."""


def pixels_at(image: OpenedImage, window: Window, encoder: DenseEncoder) -> Pixels:
    """The pixels of a window, which are resized to whole patches."""
    (rows, columns), side = window.grid, encoder.encoder.spec.patch_size
    view = View((columns * side, rows * side), window.box, window.mirrored)
    return view(image) if encoder.canvas is None else view.unresized(image, encoder.canvas)


def map_at(values: np.ndarray, window: Window, patch_size: int) -> np.ndarray:
    """The values of a map [H, W] at the pixels of a window; each takes the nearest one, none is mixed."""
    left, top, right, bottom = window.box
    rows, columns = (count * patch_size for count in window.grid)
    y = np.floor(top + (np.arange(rows) + 0.5) * (bottom - top) / rows).astype(np.intp)
    x = np.floor(left + (np.arange(columns) + 0.5) * (right - left) / columns).astype(np.intp)
    y, x = y.clip(0, values.shape[0] - 1), x.clip(0, values.shape[1] - 1)
    return values[y].take(x[::-1] if window.mirrored else x, axis=1)


def train_window(values: np.ndarray, encoder: DenseEncoder, config: DenseConfig, example: int) -> Window:
    """The random window of a train image with map `values` [H, W], a function of the example number."""
    rng = example_rng(config.seed, "crop", example)
    size, patch_size = values.shape, encoder.encoder.spec.patch_size
    mirrored = bool(rng.random() < config.flip)
    if encoder.area is not None:
        return Window((0, 0, size[1], size[0]), whole_image_grid(encoder.encoder, size), mirrored)
    region_left, region_top, region_right, region_bottom = config.region
    region = size[0] * (region_bottom - region_top), size[1] * (region_right - region_left)
    grid_size = encoder.grid[0] * patch_size, encoder.grid[1] * patch_size
    scale = rng.uniform(*config.scale_range)
    height, width = scaled_size(region, grid_size, scale, config.resize == "none")
    for _ in range(_TRIES):
        rows = side_at(height, encoder.grid[0], patch_size, rng.random())
        columns = side_at(width, encoder.grid[1], patch_size, rng.random())
        left, top, right, bottom = box_of(region, rows, columns)
        across, down = region_left * size[1], region_top * size[0]
        box = left + across, top + down, right + across, bottom + down
        window = Window(box, (rows.patches, columns.patches), mirrored)
        if config.max_class_share >= 1 or _largest_share(values, window) < config.max_class_share:
            break
    return window


def _largest_share(values: UInt8[np.ndarray, "H W"], window: Window) -> float:
    """The share of the commonest class among the pixels that count; 1 if there is one class, or none."""
    left, top, right, bottom = (int(side) for side in window.box)
    counts = np.bincount(values[top : bottom + 1 : _SAMPLED, left : right + 1 : _SAMPLED].ravel(), minlength=256)
    counts = counts[:IGNORED]
    return float(counts.max() / counts.sum()) if np.count_nonzero(counts) > 1 else 1.0


@dataclasses.dataclass(frozen=True)
class Packer:
    """Writes windows to the arrays of a batch.

    Args:
      encoder: decides the shapes.
      canvas: (R, C) of `truth`: the encoder's grid, or the most rows and columns of whole images.
    """

    encoder: DenseEncoder
    canvas: tuple[int, int]

    def __call__(
        self, windows: Sequence[Window], pixels: Sequence[Pixels], truths: Sequence[np.ndarray], rows: int
    ) -> Batch:
        """The batch of windows with their pixels, and their maps unless `truths` is empty, padded to `rows`."""
        side, length = self.encoder.encoder.spec.patch_size, self.encoder.length
        coords, valid = np.zeros((rows, length, 2), np.int32), np.zeros((rows, length), bool)
        grids = np.ones((rows, 2), np.int32)
        batch: Batch = {"coords": coords, "valid": valid, "grids": grids}
        if self.encoder.canvas is None:
            batch["patches"] = self._patches(windows, pixels, rows)
        else:
            size = self.encoder.grid[0] * side, self.encoder.grid[1] * side
            batch["unresized"] = pack(pixels, self.encoder.canvas, size, rows)
        if truths:
            nothing = IGNORED if truths[0].dtype == np.uint8 else 0
            shape = rows, self.canvas[0] * side, self.canvas[1] * side
            batch["truth"] = np.full(shape, nothing, truths[0].dtype)
        for row, window in enumerate(windows):
            grids[row] = window.grid
            where = self._positions(window.grid)
            coords[row, where] = patch_coords(window.grid)
            valid[row, where] = True
            if truths:
                truth = truths[row]
                batch["truth"][row, : truth.shape[0], : truth.shape[1]] = truth
        return batch

    def _patches(self, windows: Sequence[Window], pixels: Sequence[Pixels], rows: int) -> UInt8[np.ndarray, "B L P"]:
        side = self.encoder.encoder.spec.patch_size
        patches = np.zeros((rows, self.encoder.length, 3 * side**2), np.uint8)
        for row, (window, image) in enumerate(zip(windows, pixels)):
            where = self._positions(window.grid)
            if isinstance(where, slice):  # The window fills the row, so that nothing is copied twice.
                patchify(image, side, out=patches[row])
            else:
                patches[row, where] = patchify(image, side)
        return patches

    def _positions(self, grid: tuple[int, int]) -> slice | np.ndarray:
        """The places of a window's patches in a row of the batch, in raster order."""
        rows, columns = grid
        if rows * columns == self.encoder.length:
            return slice(None)
        if self.encoder.area is not None:
            return np.arange(rows * columns)
        return (np.arange(rows)[:, None] * self.encoder.grid[1] + np.arange(columns)).ravel()


def canvas_of(encoder: DenseEncoder, sizes: np.ndarray, scales: Sequence[float] = (1.0,)) -> tuple[int, int]:
    """(R, C): the encoder's grid; for whole images of (height, width) `sizes` [N, 2] their most rows and columns."""
    if encoder.area is None:
        return encoder.grid
    distinct = np.unique(sizes, axis=0).tolist()
    grids = [
        whole_image_grid(encoder.encoder, (height, width), scale) for height, width in distinct for scale in scales
    ]
    return max(rows for rows, _ in grids), max(columns for _, columns in grids)


def train_batches(dataset: DenseDataset, encoder: DenseEncoder, config: DenseConfig, rows: int) -> Iterator[Batch]:
    """The batches of all steps, decoded ahead; example g is the (g mod N)-th of a new order in each epoch."""
    packer, side = Packer(encoder, canvas_of(encoder, dataset.sizes)), encoder.encoder.spec.patch_size

    def load(example: int) -> tuple[Window, Pixels, np.ndarray]:
        sample = dataset[int(_order(config.seed, example // len(dataset), len(dataset))[example % len(dataset)])]
        window = train_window(sample.map, encoder, config, example)
        truth = map_at(sample.map, window, side)
        return window, pixels_at(sample.image, window, encoder), truth

    groups = (range(step * config.batch_size, (step + 1) * config.batch_size) for step in range(config.steps))
    for loaded in prefetch_map(load, groups):
        windows, pixels, truths = zip(*loaded)
        yield packer(windows, pixels, truths, rows)


@functools.lru_cache(maxsize=4)
def _order(seed: int, epoch: int, count: int) -> np.ndarray:
    return np.random.default_rng([seed, epoch]).permutation(count)
