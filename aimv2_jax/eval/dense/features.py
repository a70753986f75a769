"""Frozen features of patches for dense heads: after the final norm, or of several blocks.

B batch, L patches, F features.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from functools import cached_property
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, UInt8

from aimv2_jax.data.transforms.geometry import fit_grid
from aimv2_jax.data.transforms.resampling import Canvas, num_weights
from aimv2_jax.errors import UserError
from aimv2_jax.models.layers import Precision, RMSNorm
from aimv2_jax.models.position_embeddings import resize_positions
from aimv2_jax.parallel import rules
from aimv2_jax.pretrained.device_resize import resized_patches
from aimv2_jax.pretrained.encoder import PretrainedEncoder
from aimv2_jax.train.losses import normalise_pixels

_BATCH_PATCHES = 32 * 256
# Pixels before the resize, and by how much they shrink. A crop of ADE20K at half its size is 683 x 512 pixels, for
# windows of 512; twice the window would be four times its memory.
_CANVAS_SIDE, _CANVAS_SCALE = 1.5, 2.0


@dataclasses.dataclass(frozen=True)
class DenseEncoder:
    """A frozen encoder for windows of one grid of patches, or for whole images.

    Attributes:
      encoder: the encoder.
      grid: (rows, columns) of the largest window. The patches of a window that has fewer stay at their place in it.
      layers: the blocks whose outputs are concatenated, each after the final norm; None: the features after that norm.
      colours: use the pixels of each patch in place of features.
      scale: whole images have up to the encoder's area times the square of it.
    """

    encoder: PretrainedEncoder
    grid: tuple[int, int]
    layers: tuple[int, ...] | None = None
    colours: bool = False
    scale: float = 1.0

    def at(self, grid: tuple[int, int]) -> DenseEncoder:
        """The same encoder for windows of another grid; a table of learned positions is resized."""
        return dataclasses.replace(self, grid=grid)

    @property
    def area(self) -> int | None:
        """The largest number of patches of a whole image; None for an encoder of windows."""
        area = self.encoder.spec.area
        return None if area is None else max(1, round(area * self.scale**2))

    @property
    def canvas(self) -> Canvas | None:
        """What the devices take of a window that they resize; the host resizes a larger one.

        None: the host resizes all, as it always does for whole images, whose shapes have no useful bound.
        """
        if not self.encoder.device_resize or self.area is not None:
            return None
        height, width = (math.ceil(_CANVAS_SIDE * count * self.encoder.spec.patch_size) for count in self.grid)
        return Canvas(height, width, num_weights(_CANVAS_SCALE))

    @property
    def length(self) -> int:
        """L: patches in a row of a batch."""
        return self.area or self.grid[0] * self.grid[1]

    @property
    def batch_size(self) -> int:
        """Default number of windows in a batch of the test."""
        return max(1, _BATCH_PATCHES // self.length)

    @property
    def width(self) -> int:
        """F: features of a patch."""
        spec = self.encoder.spec
        if self.colours:
            return len(spec.pixel_mean) * spec.patch_size**2
        return spec.width * len(self.layers or (None,))

    @cached_property
    def params(self) -> Mapping[str, Any]:
        """The encoder's parameters, with positions for this grid."""
        if self.colours:
            return {}
        params, spec = self.encoder.params["encoder"], self.encoder.spec
        if spec.position == "learned" and self.grid != spec.grid:
            table = np.asarray(resize_positions(jnp.asarray(params["position"]), spec.grid, self.grid))
            params = {**params, "position": jax.device_put(table, rules.replicated(self.encoder.mesh))}
        return params

    def patches(self, batch: Mapping[str, Any]) -> UInt8[Array, "B L P"]:
        """The patches of a batch of `views.Packer`; traced inside jit."""
        if self.canvas is None:
            return batch["patches"]
        return resized_patches(batch["unresized"], self.encoder.spec.patch_size)

    def features(self, params: Any, patches: Array, coords: Array, valid: Array) -> Float[Array, "B L F"]:
        """Features in float32 of a batch with the arrays of docs/architecture.md, "Batch"; traced inside jit."""
        spec = self.encoder.spec
        pixels = normalise_pixels(patches, valid, spec.pixel_mean, spec.pixel_std)
        if self.colours:
            return pixels.astype(jnp.float32)
        precision = Precision(compute=jnp.dtype(self.encoder.dtype))
        module = spec.encoder(precision=precision).clone(num_patches=self.grid[0] * self.grid[1])
        with jax.default_matmul_precision("highest" if self.encoder.dtype == "float32" else "default"):
            if self.layers is None:
                return module.apply({"params": params}, pixels, coords, valid)[0].astype(jnp.float32)
            depth = max(self.layers)  # Only the blocks up to the last of them run.
            blocks = jax.tree.map(lambda leaf: leaf[:depth], params["trunk"]["blocks"])
            cut = {**params, "trunk": {**params["trunk"], "blocks": blocks}}
            _, hidden = module.clone(depth=depth).apply({"params": cut}, pixels, coords, valid, None, True)
            norm, norm_params = RMSNorm(spec.norm_eps, precision), {"params": params["trunk"]["norm"]}
            parts = [norm.apply(norm_params, hidden[layer]) for layer in self.layers]
        return jnp.concatenate(parts, axis=-1).astype(jnp.float32)


def whole_image_grid(encoder: PretrainedEncoder, size: tuple[int, int], scale: float = 1.0) -> tuple[int, int]:
    """The grid of patches of a whole image of (height, width) `size` at `scale`, for an encoder with an area."""
    spec, (height, width) = encoder.spec, size
    assert spec.area is not None
    area = spec.area if spec.upscale else min(spec.area, max(1, height * width // spec.patch_size**2))
    return fit_grid(width, height, max(1, round(area * scale**2)))


def parse_layers(text: str, depth: int) -> tuple[int, ...] | None:
    """The blocks of --layers: "last" (None), "four" (every quarter of the depth) or numbers such as 6,12.

    Raises:
      UserError: for anything else, or blocks that the encoder does not have.
    """
    if text == "last":
        return None
    if text == "four":
        return tuple(sorted({max(1, depth * quarter // 4) for quarter in (1, 2, 3, 4)}))
    try:
        layers = tuple(int(number) for number in text.split(","))
    except ValueError:
        layers = ()
    if not layers or not all(1 <= layer <= depth for layer in layers) or len(set(layers)) < len(layers):
        raise UserError("--layers is unknown", text, f"Give last, four, or blocks from 1 to {depth} such as 1,{depth}")
    return layers
