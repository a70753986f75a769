"""Encoder architecture and image preprocessing, independent of the training config."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import traverse_util
from flax.core import meta

from aimv2_jax.config.schema import Config
from aimv2_jax.models.encoder import Encoder
from aimv2_jax.models.layers import Precision, TrunkOptions
from aimv2_jax.models.pooling import PooledHead
from aimv2_jax.models.sizes import swiglu_hidden

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

_DEFAULT_OPTIONS, _FLOAT32 = TrunkOptions(), Precision()


@dataclasses.dataclass(frozen=True)
class EncoderSpec:
    """Sizes of an encoder and of its images.

    `image_size` is the side of the centre square that the encoder takes. With `area` it takes whole images in at most
    that many patches instead (native resolution), and enlarges small ones if `upscale`. `head`: has a pooled head.
    """

    width: int
    depth: int
    heads: int
    hidden: int
    patch_size: int
    image_size: int
    position: Literal["learned", "sincos"]
    area: int | None = None
    upscale: bool = True
    head: bool = False
    norm_eps: float = 1e-5
    pixel_mean: tuple[float, ...] = IMAGENET_MEAN
    pixel_std: tuple[float, ...] = IMAGENET_STD

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of patches of the square image."""
        side = self.image_size // self.patch_size
        return side, side

    def encoder(self, options: TrunkOptions = _DEFAULT_OPTIONS, precision: Precision = _FLOAT32) -> Encoder:
        """The module of the tree's `encoder` parameters."""
        rows, columns = self.grid
        return Encoder(
            self.width,
            self.depth,
            self.heads,
            self.hidden,
            rows * columns,
            self.norm_eps,
            self.position,
            precision,
            options,
        )

    def pooled_head(self) -> PooledHead:
        """The module of the tree's `head` parameters, for a spec with `head`."""
        return PooledHead(self.heads)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of every parameter by its path, such as "encoder/trunk/norm/scale"."""
        return {name: leaf.shape for name, leaf in traverse_util.flatten_dict(self._abstract(), sep="/").items()}

    def initial(self, rng: jax.Array) -> dict[str, Any]:
        """Newly initialised parameters."""
        rows, columns = self.grid
        patches = jnp.zeros((1, rows * columns, len(self.pixel_mean) * self.patch_size**2))
        coords, valid = jnp.zeros((1, rows * columns, 2), jnp.int32), jnp.ones((1, rows * columns), bool)
        params = {"encoder": meta.unbox(self.encoder().init(rng, patches, coords, valid)["params"])}
        if self.head:
            features = jnp.zeros((1, rows * columns, self.width))
            head = self.pooled_head().init(jax.random.fold_in(rng, 1), features, valid)["params"]
            params["head"] = meta.unbox(head)
        return params

    def _abstract(self) -> Any:
        return jax.eval_shape(self.initial, jax.eval_shape(lambda: jax.random.key(0, impl="threefry2x32")))

    def as_json(self) -> dict[str, Any]:
        """The fields as JSON, for `encoder_spec_from_json`."""
        return dataclasses.asdict(self)


def encoder_spec_from_json(tree: Mapping[str, Any]) -> EncoderSpec:
    """The `EncoderSpec` that `as_json` wrote; raises `TypeError` or `KeyError` for anything else."""
    tuples = {key: tuple(tree[key]) for key in ("pixel_mean", "pixel_std")}
    return EncoderSpec(**{**tree, **tuples})


def encoder_spec_of(config: Config) -> EncoderSpec:
    """The spec of a run's encoder."""
    model, encoder = config.model, config.model.encoder
    area = config.eval.area or max(config.data.areas, default=None)
    return EncoderSpec(
        width=encoder.width,
        depth=encoder.depth,
        heads=encoder.heads,
        hidden=encoder.hidden or swiglu_hidden(encoder.width),
        patch_size=model.patch_size,
        image_size=config.data.image_size,
        position=encoder.position,
        area=area,
        upscale=config.data.upscale,
        norm_eps=model.norm_eps,
        pixel_mean=model.pixel_mean,
        pixel_std=model.pixel_std,
    )
