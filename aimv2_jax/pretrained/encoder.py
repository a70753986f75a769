"""Pretrained encoder that maps images to features (`load_encoder`).

N images, B batch, L patches, P pixel values per patch, D width, H and W pixels, h and w patches.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util
from jax.sharding import Mesh
from jaxtyping import Array, Float, UInt8

from aimv2_jax.checkpoint.checkpointer import WeightChoice
from aimv2_jax.data.transforms import geometry
from aimv2_jax.data.transforms.resampling import Canvas, Unresized, num_weights
from aimv2_jax.data.transforms.views import View, evaluation_view
from aimv2_jax.errors import UserError
from aimv2_jax.models.layers import Precision
from aimv2_jax.models.position_embeddings import resize_positions
from aimv2_jax.parallel import rules
from aimv2_jax.parallel.mesh import build_mesh
from aimv2_jax.platforms import skip_absent_tpu
from aimv2_jax.pretrained.device_resize import pack, resized_patches
from aimv2_jax.pretrained.encoder_spec import EncoderSpec
from aimv2_jax.pretrained.images import ImageLike, OpenedImage, check_image_list, open_image
from aimv2_jax.pretrained.lazy_weights import LazyWeights
from aimv2_jax.pretrained.source import open_weights
from aimv2_jax.train.losses import normalise_pixels

_BATCH_PATCHES = 32 * 256  # Patches in a batch of the default size.
# Pixels before the resize, for each of the result's: an image of 512 pixels has 2.3 at 224.
_CANVAS_SCALE = 2.6
_MAX_AREA = 1 << 14  # Patches per image; attention memory makes larger values almost certainly a mistake.

Pixels = UInt8[np.ndarray, "H W 3"] | Unresized
"""The pixels of an image as an encoder sees it, or what the devices resize to them."""


def load_encoder(
    spec: str | Path,
    dtype: Literal["float32", "bfloat16"] = "float32",
    image_size: int | None = None,
    area: int | None = None,
    heads: int | None = None,
    weights: WeightChoice = "average",
) -> PretrainedEncoder:
    """Loads an encoder from a run, an export, a Hugging Face folder or Apple's file.

    Args:
      spec: the weights, see `pretrained.source.open_weights`.
      dtype: dtype of the computation and the features.
      image_size: side of the centre square, in place of the model's own; learned positions are resized.
      area: use whole images in at most this many patches; for models with sin-cos positions.
      heads: attention heads, for a .safetensors file without a config.
      weights: "average": averaged parameters if the run kept them; "raw": those of the step.

    Raises:
      UserError: for unreadable weights, or a size that the model does not support.
    """
    skip_absent_tpu()
    return encoder_of(open_weights(spec, heads, weights), dtype, image_size, area)


def encoder_of(
    weights: LazyWeights, dtype: str = "float32", image_size: int | None = None, area: int | None = None
) -> PretrainedEncoder:
    """Like `load_encoder`, for weights that are already open."""
    if dtype not in ("float32", "bfloat16"):
        raise UserError("dtype is unknown", dtype, "Choose float32 or bfloat16")
    spec = _with_resolution(weights.spec, image_size, area)
    params = weights.read()
    if spec.grid != weights.spec.grid and spec.position == "learned":
        table = jnp.asarray(params["encoder/position"])
        params["encoder/position"] = np.asarray(resize_positions(table, weights.spec.grid, spec.grid))
    mesh = build_mesh(1, -1, 1, 1, jax.local_devices())
    tree = traverse_util.unflatten_dict(params, sep="/")
    params = jax.device_put(tree, rules.replicated(mesh))
    # On CPU the "devices" are the host itself, whose Pillow resizes faster.
    return PretrainedEncoder(weights.source, spec, params, mesh, dtype, jax.default_backend() != "cpu")


def _with_resolution(spec: EncoderSpec, image_size: int | None, area: int | None) -> EncoderSpec:
    if image_size is not None and area is not None:
        raise UserError("image_size and area are both given", (image_size, area), "Give one of them")
    if image_size is not None:
        if image_size < spec.patch_size or image_size % spec.patch_size:
            nearest = max(1, round(image_size / spec.patch_size)) * spec.patch_size
            what = f"image_size is not a multiple of the patch size {spec.patch_size}"
            raise UserError(what, image_size, f"Give {nearest}, for example")
        return dataclasses.replace(spec, image_size=image_size, area=None)
    if area is not None:
        if spec.position != "sincos":
            what = "area needs a model with sin-cos positions, and this one has learned positions"
            raise UserError(what, area, "Give image_size")
        if not 1 <= area <= _MAX_AREA:
            raise UserError("area is out of range", area, f"Give 1 to {_MAX_AREA} patches")
        return dataclasses.replace(spec, area=area)
    return spec


@dataclasses.dataclass(frozen=True)
class PretrainedEncoder:
    """Maps images to features. Parameters are replicated on `mesh`; batches are split over its devices.

    With `device_resize`, images are resized on the devices, to the same pixels as on the host.
    """

    source: str
    spec: EncoderSpec
    params: Mapping[str, Any]
    mesh: Mesh
    dtype: str = "float32"
    device_resize: bool = False

    def __call__(
        self, images: Sequence[ImageLike], batch_size: int | None = None
    ) -> Float[np.ndarray, "N L D"] | list[Float[np.ndarray, "h w D"]]:
        """Features after the final norm, of images of any size.

        A fixed-resolution model takes the centre square of each image and returns [N, patches, width] in raster order.
        A native-resolution model takes whole images and returns one [h, w, width] for each.

        Raises:
          UserError: for an item that is not an image.
        """
        native = self.spec.area is not None
        outputs: list[np.ndarray] = []
        for batch, grids in self.batches(images, batch_size):
            features = np.asarray(self.features(**batch))
            for row, (rows, columns) in enumerate(grids):
                image_features = features[row, : rows * columns]
                outputs.append(image_features.reshape(rows, columns, -1) if native else image_features)
        if native:
            return outputs
        empty = np.zeros((0, self.num_patches, self.spec.width), jnp.dtype(self.dtype))
        return np.stack(outputs) if outputs else empty

    def pooled(self, images: Sequence[ImageLike], batch_size: int | None = None) -> Float[np.ndarray, "N D"]:
        """One vector per image, by the model's pooled head.

        Raises:
          UserError: for a model without a pooled head.
        """
        if not self.spec.head:
            raise UserError("the model has no pooled head", self.source, "Use the features of its patches")
        parts = [
            np.asarray(self._pooled(self.params, **batch))[: len(grids)]
            for batch, grids in self.batches(images, batch_size)
        ]
        return np.concatenate(parts) if parts else np.zeros((0, self.spec.width), jnp.dtype(self.dtype))

    @cached_property
    def digest(self) -> str:
        """Hash of the parameters, the spec and the dtype."""
        content = hashlib.sha256(json.dumps([self.spec.as_json(), self.dtype], sort_keys=True).encode())
        for name, leaf in sorted(traverse_util.flatten_dict(dict(self.params), sep="/").items()):
            content.update(name.encode())
            content.update(np.ascontiguousarray(leaf).data)
        return content.hexdigest()[:32]

    @property
    def batch_size(self) -> int:
        """Default number of images per batch."""
        return max(1, _BATCH_PATCHES // self.num_patches)

    @property
    def num_patches(self) -> int:
        """L of a batch: the patches of the square, or the area of a native-resolution model."""
        rows, columns = self.spec.grid
        return self.spec.area or rows * columns

    @property
    def canvas(self) -> Canvas | None:
        """What the devices take of an image that they make a square; the host resizes a larger one. None: all."""
        if not self.device_resize or self.spec.area is not None:
            return None
        side = math.ceil(_CANVAS_SCALE * self.spec.image_size)
        return Canvas(side, side, num_weights(_CANVAS_SCALE))

    def batches(
        self, images: Sequence[ImageLike], batch_size: int | None = None
    ) -> Iterator[tuple[dict[str, jax.Array], list[tuple[int, int]]]]:
        """Yields `batch` of `batch_size` images at a time (by default 32 of 256 patches); the last one is padded."""
        check_image_list(images)
        batch_size = batch_size or self.batch_size
        for start in range(0, len(images), batch_size):
            pixels = [self.decoded(image) for image in images[start : start + batch_size]]
            # A few images get a smaller batch; larger calls are padded, so that they compile once.
            yield self.batch(pixels, batch_size if start or len(pixels) > batch_size // 2 else len(pixels))

    def batch(self, pixels: Sequence[Pixels], rows: int) -> tuple[dict[str, jax.Array], list[tuple[int, int]]]:
        """Device arrays for `features` from the results of `pixels` or `decoded`, and the patch grid of each image.

        The batch is padded with invalid rows to `rows`, and to a multiple of the number of devices.
        """
        rows = -(-rows // self.mesh.size) * self.mesh.size
        if pixels and isinstance(pixels[0], Unresized):
            return self._resized_batch(pixels, rows), [self.spec.grid] * len(pixels)
        side, length = self.spec.patch_size, self.num_patches
        patches = np.zeros((rows, length, 3 * side**2), np.uint8)
        coords, valid = np.zeros((rows, length, 2), np.int32), np.zeros((rows, length), bool)
        grids = [(image.shape[0] // side, image.shape[1] // side) for image in pixels]
        for row, image in enumerate(pixels):
            geometry.write_patches(image, side, patches[row], coords[row], valid[row])
        arrays = {"patches": patches, "coords": coords, "valid": valid}
        return jax.device_put(arrays, rules.batch_sharding(self.mesh)), grids

    def _resized_batch(self, images: Sequence[Unresized], rows: int) -> dict[str, jax.Array]:
        assert self.canvas is not None
        square = self.spec.image_size, self.spec.image_size
        valid = np.zeros((rows, self.num_patches), bool)
        valid[: len(images)] = True
        coords = geometry.patch_coords(self.spec.grid) * valid[..., None]
        arrays = {"images": pack(images, self.canvas, square, rows), "coords": coords, "valid": valid}
        arrays = jax.device_put(arrays, rules.batch_sharding(self.mesh))
        return {"patches": _patches(arrays.pop("images"), self.spec.patch_size), **arrays}

    def pixels(self, image: ImageLike) -> np.ndarray:
        """The model's input as uint8 [H, W, 3]: the centre square, or the whole image (`evaluation_view`)."""
        opened = open_image(image)
        return self._view(opened)(opened)

    def decoded(self, image: ImageLike) -> Pixels:
        """The result of `pixels`, or what `batch` makes of it on the devices."""
        if self.canvas is None:
            return self.pixels(image)
        opened = open_image(image)
        return self._view(opened).unresized(opened, self.canvas)

    def _view(self, image: OpenedImage) -> View:
        spec = self.spec
        return evaluation_view(image.size, spec.image_size, spec.patch_size, spec.area, spec.upscale)

    def features(self, patches: Array, coords: Array, valid: Array, layer: int | None = None) -> Float[Array, "B L D"]:
        """Features of a batch on the devices, with the arrays of docs/architecture.md, "Batch".

        They are taken after the final norm, or with `layer` from the residual stream: 0 is before the first block,
        `depth` after the last.
        """
        return self._features(self.params, patches, coords, valid, layer=layer)

    @cached_property
    def _features(self) -> Any:
        spec, precision = self.spec, Precision(compute=jnp.dtype(self.dtype))

        def features(params: Any, patches: Array, coords: Array, valid: Array, layer: int | None = None) -> Array:
            pixels = normalise_pixels(patches, valid, spec.pixel_mean, spec.pixel_std)
            params, encoder = params["encoder"], spec.encoder(precision=precision)
            with jax.default_matmul_precision("highest" if self.dtype == "float32" else "default"):
                if layer is None:
                    return encoder.apply({"params": params}, pixels, coords, valid)[0]
                # Only the blocks up to `layer` run: a scan over all blocks would keep the output of each.
                blocks = jax.tree.map(lambda leaf: leaf[: max(layer, 1)], params["trunk"]["blocks"])
                params = params | {"trunk": params["trunk"] | {"blocks": blocks}}
                encoder = encoder.clone(depth=max(layer, 1))
                _, hidden_states = encoder.apply({"params": params}, pixels, coords, valid, None, True)
                return hidden_states[layer]

        return jax.jit(features, static_argnames="layer")

    @cached_property
    def _pooled(self) -> Any:
        head = self.spec.pooled_head()

        def pooled(params: Any, patches: Array, coords: Array, valid: Array) -> Array:
            features = self._features(params, patches, coords, valid)
            return head.apply({"params": params["head"]}, features, valid)

        return jax.jit(pooled)


def mirrored(pixels: Pixels) -> Pixels:
    """The same image, flipped left to right."""
    return pixels.mirrored() if isinstance(pixels, Unresized) else pixels[:, ::-1]


_patches = jax.jit(resized_patches, static_argnames="patch_size")
