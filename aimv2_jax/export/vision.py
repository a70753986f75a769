"""What an encoder is by itself: its sizes, and how pictures become its input."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import traverse_util
from flax.core import meta

from aimv2_jax.config import Config
from aimv2_jax.models.encoder import Encoder
from aimv2_jax.models.layers import Precision, Run
from aimv2_jax.models.pooling import PooledHead
from aimv2_jax.models.sizes import swiglu_hidden

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

_PLAIN, _FLOAT32 = Run(), Precision()


@dataclasses.dataclass(frozen=True)
class Vision:
    """Sizes of an encoder and its pictures.

    `image_size` is the side of the centre square that it sees; where `area` is given it sees whole pictures in at most
    that many patches instead (native resolution), small ones enlarged with `upscale`. `head` says whether a pooled head
    comes with it.
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
        """Rows and columns of patches of the square picture."""
        side = self.image_size // self.patch_size
        return side, side

    def encoder(self, run: Run = _PLAIN, precision: Precision = _FLOAT32) -> Encoder:
        """The module whose parameters are `encoder` of the tree."""
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
            run,
        )

    def pooled_head(self) -> PooledHead:
        """The module whose parameters are `head` of the tree, where there are any."""
        return PooledHead(self.heads)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of every parameter by its path, such as "encoder/trunk/norm/scale"."""
        return {name: leaf.shape for name, leaf in traverse_util.flatten_dict(self._abstract(), sep="/").items()}

    def initial(self, rng: jax.Array) -> dict[str, Any]:
        """Fresh parameters."""
        rows, columns = self.grid
        patches = jnp.zeros((1, rows * columns, len(self.pixel_mean) * self.patch_size**2))
        coords, valid = jnp.zeros((1, rows * columns, 2), jnp.int32), jnp.ones((1, rows * columns), bool)
        params = {"encoder": meta.unbox(self.encoder().init(rng, patches, coords, valid)["params"])}
        if self.head:
            features = jnp.zeros((1, rows * columns, self.width))
            params["head"] = self.pooled_head().init(jax.random.fold_in(rng, 1), features, valid)["params"]
        return params

    def _abstract(self) -> Any:
        return jax.eval_shape(self.initial, jax.eval_shape(lambda: jax.random.key(0, impl="threefry2x32")))

    def as_json(self) -> dict[str, Any]:
        """What `vision_from_json` reads back."""
        return dataclasses.asdict(self)


def vision_from_json(tree: Mapping[str, Any]) -> Vision:
    """The `Vision` that `as_json` wrote; raises `TypeError` or `KeyError` for anything else."""
    numbers = {key: tuple(tree[key]) for key in ("pixel_mean", "pixel_std")}
    return Vision(**{**tree, **numbers})


def vision_of(config: Config) -> Vision:
    """That of a run's encoder."""
    model, encoder = config.model, config.model.encoder
    area = config.eval.area or max(config.data.areas, default=None)
    return Vision(
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
