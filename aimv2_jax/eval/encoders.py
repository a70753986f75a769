"""An encoder to be used: pictures in, features out (`load_encoder`).

N pictures, B a batch of them, L patches, P numbers a patch, D width, H and W pixels, h and w patches.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util
from jax.sharding import Mesh
from jaxtyping import Array, Float

from aimv2_jax.data import transforms
from aimv2_jax.errors import UserError
from aimv2_jax.eval.images import ImageLike, check_several, open_image
from aimv2_jax.eval.load import Choice
from aimv2_jax.export.source import open_weights
from aimv2_jax.export.vision import Vision
from aimv2_jax.export.weights import Weights
from aimv2_jax.models.layers import Precision
from aimv2_jax.models.positions import resize_positions
from aimv2_jax.parallel import rules
from aimv2_jax.parallel.mesh import build_mesh
from aimv2_jax.platforms import skip_absent_tpu
from aimv2_jax.train.losses import normalise_pixels

_BATCH_PATCHES = 32 * 256  # Of a batch, unless it is asked otherwise.
_MOST_AREA = 1 << 14  # Patches of a picture: beyond, attention's memory is a slip's, not a wish's.


def load_encoder(
    spec: str | Path,
    dtype: Literal["float32", "bfloat16"] = "float32",
    image_size: int | None = None,
    area: int | None = None,
    heads: int | None = None,
    weights: Choice = "average",
) -> LoadedEncoder:
    """An encoder that takes pictures, from a run, an export, Hugging Face's folder or Apple's file.

    Args:
      spec: where it is, see `export.source.open_weights`.
      dtype: of the computation and the features.
      image_size: side of the centre square that it shall see, in place of its own; learned positions are resized.
      area: whole pictures in at most this many patches, in place of its own way; for models with sin-cos positions.
      heads: of a file that does not tell.
      weights: the average of a run, where it kept one, or those of the step.

    Raises:
      UserError: for what cannot be read, or a size that the model cannot see.
    """
    skip_absent_tpu()
    return encoder_of(open_weights(spec, heads, weights), dtype, image_size, area)


def encoder_of(
    found: Weights, dtype: str = "float32", image_size: int | None = None, area: int | None = None
) -> LoadedEncoder:
    """The same for weights that are open."""
    if dtype not in ("float32", "bfloat16"):
        raise UserError("dtype is unknown", dtype, "Choose float32 or bfloat16")
    vision = _seen(found.vision, image_size, area)
    params = found.read()
    if vision.grid != found.vision.grid and vision.position == "learned":
        table = jnp.asarray(params["encoder/position"])
        params["encoder/position"] = np.asarray(resize_positions(table, found.vision.grid, vision.grid))
    mesh = build_mesh(1, -1, 1, 1, jax.local_devices())
    tree = traverse_util.unflatten_dict(params, sep="/")
    return LoadedEncoder(found.source, vision, jax.device_put(tree, rules.replicated(mesh)), mesh, dtype)


def _seen(vision: Vision, image_size: int | None, area: int | None) -> Vision:
    if image_size is not None and area is not None:
        raise UserError("image_size and area are both given", (image_size, area), "Give one of them")
    if image_size is not None:
        if image_size < vision.patch_size or image_size % vision.patch_size:
            near = max(1, round(image_size / vision.patch_size)) * vision.patch_size
            raise UserError(
                f"image_size is no multiple of the patch size {vision.patch_size}", image_size, f"Give {near}, say"
            )
        return dataclasses.replace(vision, image_size=image_size, area=None)
    if area is not None:
        if vision.position != "sincos":
            raise UserError(
                "area is for models with sin-cos positions, and this one has learned ones", area, "Give image_size"
            )
        if not 1 <= area <= _MOST_AREA:
            raise UserError("area is out of range", area, f"Give 1 to {_MOST_AREA} patches")
        return dataclasses.replace(vision, area=area)
    return vision


@dataclasses.dataclass(frozen=True)
class LoadedEncoder:
    """Pictures to features. Parameters are whole on every device of `mesh`, rows of a batch are split among them."""

    source: str
    vision: Vision
    params: Mapping[str, Any]
    mesh: Mesh
    dtype: str = "float32"

    def __call__(
        self, images: Sequence[ImageLike], batch_size: int | None = None
    ) -> Float[np.ndarray, "N L D"] | list[Float[np.ndarray, "h w D"]]:
        """Features after the final norm, of pictures of any sizes.

        A fixed-resolution model sees the centre square of each, and gives [N, patches, width] in raster order; a native
        one the whole, and gives a [h, w, width] for each.

        Raises:
          UserError: for what is no picture.
        """
        native = self.vision.area is not None
        found: list[np.ndarray] = []
        for batch, grids in self.batches(images, batch_size):
            features = np.asarray(self.features(**batch))
            for row, (rows, columns) in enumerate(grids):
                one = features[row, : rows * columns]
                found.append(one.reshape(rows, columns, -1) if native else one)
        if native:
            return found
        empty = np.zeros((0, self.num_patches, self.vision.width), jnp.dtype(self.dtype))
        return np.stack(found) if found else empty

    def pooled(self, images: Sequence[ImageLike], batch_size: int | None = None) -> Float[np.ndarray, "N D"]:
        """One vector a picture, by the head that came with the model.

        Raises:
          UserError: where there is none.
        """
        if not self.vision.head:
            raise UserError("the model has no pooled head", self.source, "Use the features of its patches")
        parts = [
            np.asarray(self._pooled(self.params, **batch))[: len(grids)]
            for batch, grids in self.batches(images, batch_size)
        ]
        return np.concatenate(parts) if parts else np.zeros((0, self.vision.width), jnp.dtype(self.dtype))

    @cached_property
    def digest(self) -> str:
        """A name for just these parameters and this way of seeing pictures."""
        content = hashlib.sha256(json.dumps([self.vision.as_json(), self.dtype], sort_keys=True).encode())
        for name, leaf in sorted(traverse_util.flatten_dict(dict(self.params), sep="/").items()):
            content.update(name.encode())
            content.update(np.ascontiguousarray(leaf).data)
        return content.hexdigest()[:32]

    @property
    def batch_size(self) -> int:
        """Pictures at a time, unless it is asked otherwise."""
        return max(1, _BATCH_PATCHES // self.num_patches)

    @property
    def num_patches(self) -> int:
        """L of a batch: the patches of the square, or the area."""
        rows, columns = self.vision.grid
        return self.vision.area or rows * columns

    def batches(
        self, images: Sequence[ImageLike], batch_size: int | None = None
    ) -> Iterator[tuple[dict[str, jax.Array], list[tuple[int, int]]]]:
        """`batch` of `batch_size` pictures at a time (by default 32 of 256 patches); the last has rows of padding."""
        check_several(images)
        batch_size = batch_size or self.batch_size
        for start in range(0, len(images), batch_size):
            pixels = [self.pixels(image) for image in images[start : start + batch_size]]
            # Few pictures are not worth a whole batch, many should compile once.
            yield self.batch(pixels, batch_size if start or len(pixels) > batch_size // 2 else len(pixels))

    def batch(self, pixels: Sequence[np.ndarray], rows: int) -> tuple[dict[str, jax.Array], list[tuple[int, int]]]:
        """What `features` takes, of pictures as the model sees them; and the grid of each.

        Rows are filled up to `rows`, and to a multiple of the devices, with such that nobody reads.
        """
        rows = -(-rows // self.mesh.size) * self.mesh.size
        side, length = self.vision.patch_size, self.num_patches
        patches = np.zeros((rows, length, 3 * side**2), np.uint8)
        coords, valid = np.zeros((rows, length, 2), np.int32), np.zeros((rows, length), bool)
        grids = [(picture.shape[0] // side, picture.shape[1] // side) for picture in pixels]
        for row, (picture, grid) in enumerate(zip(pixels, grids)):
            used = slice(grid[0] * grid[1])
            transforms.patchify(picture, side, out=patches[row, used])
            coords[row, used], valid[row, used] = transforms.patch_coords(grid), True
        arrays = {"patches": patches, "coords": coords, "valid": valid}
        return jax.device_put(arrays, rules.batch_sharding(self.mesh)), grids

    def pixels(self, image: ImageLike) -> np.ndarray:
        """A picture as the model sees it, uint8 [H, W, 3]: its centre (`center_view`), or whole; resized once."""
        picture, vision = open_image(image), self.vision
        if vision.area is None:
            return transforms.center_view(picture.whole(), vision.image_size)
        width, height = picture.size
        most = vision.area if vision.upscale else min(vision.area, max(1, width * height // vision.patch_size**2))
        rows, columns = transforms.fit_grid(width, height, most)
        size = (columns * vision.patch_size, rows * vision.patch_size)
        decoded, box = picture.decode((0, 0, width, height), size)
        return transforms.resize(decoded, box, size)

    def features(self, patches: Array, coords: Array, valid: Array, layer: int | None = None) -> Float[Array, "B L D"]:
        """Features of a batch as the data's (LAYOUT.md, "Batch"), on the devices.

        After the final norm; or with `layer` the residual stream there: 0 before the first block, `depth` after the
        last.
        """
        return self._features(self.params, patches, coords, valid, layer=layer)

    @cached_property
    def _features(self) -> Any:
        vision, precision = self.vision, Precision(compute=jnp.dtype(self.dtype))

        def features(params: Any, patches: Array, coords: Array, valid: Array, layer: int | None = None) -> Array:
            pixels = normalise_pixels(patches, valid, vision.pixel_mean, vision.pixel_std)
            params, whole = params["encoder"], vision.encoder(precision=precision)
            with jax.default_matmul_precision("highest" if self.dtype == "float32" else "default"):
                if layer is None:
                    return whole.apply({"params": params}, pixels, coords, valid)[0]
                # As many blocks as are asked: of a scan over all, every layer's rows would be kept.
                blocks = jax.tree.map(lambda leaf: leaf[: max(layer, 1)], params["trunk"]["blocks"])
                params = params | {"trunk": params["trunk"] | {"blocks": blocks}}
                every = whole.clone(depth=max(layer, 1)).apply({"params": params}, pixels, coords, valid, None, True)[1]
                return every[layer]

        return jax.jit(features, static_argnames="layer")

    @cached_property
    def _pooled(self) -> Any:
        head = self.vision.pooled_head()

        def pooled(params: Any, patches: Array, coords: Array, valid: Array) -> Array:
            features = self._features(params, patches, coords, valid)
            return head.apply({"params": params["head"]}, features, valid)

        return jax.jit(pooled)
