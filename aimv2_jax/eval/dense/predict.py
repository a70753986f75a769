"""Predicts maps of whole images at their own size, window by window. H and W pixels, n windows, K outputs."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float
from tqdm import tqdm

from aimv2_jax.eval.dense.dataset import DenseDataset, Sample
from aimv2_jax.eval.dense.features import DenseEncoder, whole_image_grid
from aimv2_jax.eval.dense.heads import merged, on_canvas
from aimv2_jax.eval.dense.settings import DEPTH, DenseConfig
from aimv2_jax.eval.dense.train import TrainedHead, padded_rows, patch_outputs
from aimv2_jax.eval.dense.views import Packer, canvas_of, pixels_at
from aimv2_jax.eval.dense.windows import Window, sliding_windows, window_weights
from aimv2_jax.eval.probes.features import prefetch_map
from aimv2_jax.parallel import rules
from aimv2_jax.pretrained.encoder import Pixels
from aimv2_jax.pretrained.images import OpenedImage

# Pixels are predicted in blocks of these rows, and of a multiple of these columns, so that few programs are compiled.
_BLOCK_ROWS, _BLOCK_COLUMNS = 64, 128


@dataclasses.dataclass(frozen=True)
class Prediction:
    """A sample and its predicted map: classes as uint8, or depths in metres."""

    sample: Sample
    predicted: np.ndarray


@dataclasses.dataclass(frozen=True)
class Predictor:
    """Predicts the maps of a dataset.

    Args:
      encoder: for windows of evaluation; its `scale` covers all of `config.scales`.
      trained: the head.
      config: of the probe.
      canvas: see `views.Packer`.
      batch_size: images that are decoded together, and windows in a batch of the encoder.
    """

    encoder: DenseEncoder
    trained: TrainedHead
    config: DenseConfig
    canvas: tuple[int, int]
    batch_size: int

    def __call__(self, dataset: DenseDataset) -> Iterator[Prediction]:
        """Yields the samples in order with their predictions."""
        starts = range(0, len(dataset), self.batch_size)
        groups = (range(start, min(start + self.batch_size, len(dataset))) for start in starts)
        loaded = prefetch_map(lambda index: self.load(dataset[index]), groups)
        for group in tqdm(loaded, total=len(starts), desc="test", unit="batch"):
            windows = [window for _, views in group for view in views for window in view[0]]
            pixels = [image for _, views in group for view in views for image in view[1]]
            outputs = iter(self._encoded(windows, pixels))
            for sample, views in group:
                of_views = [(view, np.stack([next(outputs) for _ in view])) for view, _ in views]
                yield Prediction(sample, self.merge(of_views, sample.map.shape))

    def views(self, size: tuple[int, int]) -> list[list[Window]]:
        """The windows of an image of (height, width) `size`, by scale and mirror."""
        config, spec = self.config, self.encoder.encoder.spec
        views = []
        for scale in config.scales:
            for mirrored in (False, True)[: 1 + config.flip_test]:
                if spec.area is not None:
                    grid = whole_image_grid(self.encoder.encoder, size, scale)
                    views.append([Window((0, 0, size[1], size[0]), grid, mirrored)])
                    continue
                own_size = config.resize == "none"
                grid, side, stride = self.encoder.grid, spec.patch_size, config.stride
                views.append(sliding_windows(size, grid, side, stride, scale, own_size, mirrored))
        return views

    def merge(
        self, views: Sequence[tuple[Sequence[Window], Float[np.ndarray, "n R C K"]]], size: tuple[int, int]
    ) -> np.ndarray:
        """The predicted map [H, W] of an image of (height, width) `size`, from its windows and their outputs."""
        height, width = size
        depth = self.config.task == DEPTH
        predicted = np.zeros(size, np.float32 if depth else np.uint8)
        columns_padded = -(-width // _BLOCK_COLUMNS) * _BLOCK_COLUMNS
        prepared = []
        for windows, outputs in views:
            rows, columns = window_weights(windows, size, self.canvas)
            count = 1 << (len(windows) - 1).bit_length()
            missing = count - len(windows)
            rows = np.pad(rows, ((0, missing), (0, -height % _BLOCK_ROWS), (0, 0)))
            columns = np.pad(columns, ((0, missing), (0, columns_padded - width), (0, 0)))
            padded = np.pad(outputs, ((0, missing), (0, 0), (0, 0), (0, 0)))
            prepared.append((jnp.asarray(padded), rows, jnp.asarray(columns)))
        for top in range(0, height, _BLOCK_ROWS):
            block = slice(top, top + _BLOCK_ROWS)
            total = sum(merged(outputs, rows[:, block], columns, not depth) for outputs, rows, columns in prepared)
            if depth:
                values = np.asarray(total[..., 0] / len(prepared)).clip(*self.config.depths)
            else:
                values = np.asarray(jnp.argmax(total, axis=-1))
            predicted[block] = values[: height - top, :width]
        return predicted

    def load(self, sample: Sample) -> tuple[Sample, list[tuple[list[Window], list[Pixels]]]]:
        """The sample, and its windows with their pixels by view; runs in threads, ahead of the encoder."""
        views = self.views(sample.map.shape)
        windows = [window for view in views for window in view]
        pixels = iter(_pixels_of(sample.image, windows, self.encoder))
        return sample, [(view, [next(pixels) for _ in view]) for view in views]

    def _encoded(self, windows: Sequence[Window], pixels: Sequence[Pixels]) -> Iterator[np.ndarray]:
        """The outputs [R, C, K] of each window."""
        mesh, packer = self.encoder.encoder.mesh, Packer(self.encoder, self.canvas)
        rows = padded_rows(self.batch_size, mesh)
        for start in range(0, len(windows), rows):
            part = slice(start, start + rows)
            batch = packer(windows[part], pixels[part], (), rows)
            on_devices = jax.device_put(batch, rules.batch_sharding(mesh))
            outputs = self._outputs(self.encoder.params, self.trained.variables, on_devices)
            yield from np.asarray(outputs)[: len(windows[part])]

    @cached_property
    def _outputs(self) -> Any:
        encoder, head, config, canvas = self.encoder, self.trained.head, self.config, self.canvas

        def outputs(encoder_params: Any, variables: Any, batch: dict[str, Any]) -> Array:
            features = encoder.features(encoder_params, encoder.patches(batch), batch["coords"], batch["valid"])
            values = patch_outputs(head.apply(variables, features, batch["valid"]), config)
            return on_canvas(values, batch["grids"], canvas, encoder.area is not None)

        return jax.jit(outputs)


def predictor_of(
    encoder: DenseEncoder, trained: TrainedHead, config: DenseConfig, test: DenseDataset, batch_size: int
) -> Predictor:
    """The predictor for a test dataset: windows of `config.window`, or whole images at the scales of the config."""
    patch_size = encoder.encoder.spec.patch_size
    if config.window is not None and encoder.area is None:
        encoder = encoder.at(whole_patches(config.window, patch_size))
    encoder = dataclasses.replace(encoder, scale=max(config.scales))
    return Predictor(encoder, trained, config, canvas_of(encoder, test.sizes, config.scales), batch_size)


def whole_patches(size: tuple[int, int], patch_size: int) -> tuple[int, int]:
    """(rows, columns) of patches nearest to (height, width) pixels."""
    height, width = (max(1, round(side / patch_size)) for side in size)
    return height, width


def _pixels_of(image: OpenedImage, windows: Sequence[Window], encoder: DenseEncoder) -> list[Pixels]:
    """The pixels of each window; an image with several is decoded once."""
    if len(windows) > 1:
        image = OpenedImage(image.name, image.size, image.decode_full())
    return [pixels_at(image, window, encoder) for window in windows]
