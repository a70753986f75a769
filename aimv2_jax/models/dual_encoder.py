"""Image encoder and text tower with embeddings in one space, as in aimv2-large-patch14-224-lit.

B batch, L patches, P pixels a patch, T text tokens, D width of a tower, E embedding.
"""

from __future__ import annotations

import math
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Bool, Float, Int

from aimv2_jax.models.aimv2 import take_rows
from aimv2_jax.models.encoder import Encoder
from aimv2_jax.models.layers import Linear, named, symmetric_uniform
from aimv2_jax.models.pooling import PooledHead
from aimv2_jax.models.text_tower import TextTower

ContrastiveLoss = Literal["softmax", "sigmoid"]

MAX_LOGIT_SCALE = 100.0
_INITIAL_LOGIT_SCALE = {"softmax": 1 / 0.07, "sigmoid": 10.0}  # CLIP's [R], and SigLIP's.
_INITIAL_LOGIT_BIAS = -10.0  # SigLIP's.


class Embeddings(NamedTuple):
    """Embeddings of a batch of pairs, float32 of length 1; logits are scale · image · text (+ bias)."""

    image: Float[Array, "B E"]
    text: Float[Array, "B E"]
    scale: Float[Array, ""]
    bias: Float[Array, ""] | None


class DualEncoder(nn.Module):
    """Two towers, each with a projection to the shared space; only the image tower is pooled by attention.

    The towers compute in their own precision, all after them in float32. `loss` decides where the scale starts, and
    whether there is a bias.
    """

    encoder: Encoder
    text: TextTower
    embed_dim: int
    loss: ContrastiveLoss = "softmax"

    def setup(self):
        self.head = PooledHead(self.encoder.heads)
        self.image_projection = self._projection(self.encoder.width)
        self.text_projection = self._projection(self.text.width)
        start = nn.initializers.constant(math.log(_INITIAL_LOGIT_SCALE[self.loss]))
        self.logit_scale = self.param("logit_scale", named(start), (), jnp.float32)
        if self.loss == "sigmoid":
            start = nn.initializers.constant(_INITIAL_LOGIT_BIAS)
            self.logit_bias = self.param("logit_bias", named(start), (), jnp.float32)

    def _projection(self, width: int) -> Linear:
        precision = self.text.precision._replace(compute=jnp.float32)
        return Linear(self.embed_dim, ("features", "output"), precision, kernel_init=symmetric_uniform(width))

    def __call__(
        self,
        patches: Float[Array, "B L P"],
        coords: Int[Array, "B L 2"],
        valid: Bool[Array, "B L"],
        tokens: Int[Array, "B T"],
        end_index: Int[Array, " B"],
    ) -> Embeddings:
        """Embeds a batch of pairs; arguments as in `image_embedding` and `text_embedding`."""
        return Embeddings(
            self.image_embedding(patches, coords, valid),
            self.text_embedding(tokens, end_index),
            self.scale(),
            self.logit_bias if self.loss == "sigmoid" else None,
        )

    def image_embedding(
        self, patches: Float[Array, "B L P"], coords: Int[Array, "B L 2"], valid: Bool[Array, "B L"]
    ) -> Float[Array, "B E"]:
        """Embeds images; arguments as in `Encoder`, with full attention."""
        features, _ = self.encoder(patches, coords, valid)
        return self.embed_features(features, valid)

    def embed_features(self, features: Float[Array, "B L D"], valid: Bool[Array, "B L"]) -> Float[Array, "B E"]:
        """Embeds images from the encoder's features, which a frozen encoder computes once."""
        return normalise_rows(self.image_projection(self.head(features, valid)))

    def text_embedding(self, tokens: Int[Array, "B T"], end_index: Int[Array, " B"]) -> Float[Array, "B E"]:
        """Embeds texts by the row of their first end token, at `end_index` (`text_tower.first_index`)."""
        features, _ = self.text(tokens)
        return normalise_rows(self.text_projection(take_rows(features, end_index[:, None])[:, 0]))

    def scale(self) -> Float[Array, ""]:
        """The factor of the logits, from 1 to 100; beyond these its parameter has no gradient."""
        return jnp.exp(jnp.clip(self.logit_scale, 0, math.log(MAX_LOGIT_SCALE)))


def normalise_rows(x: Float[Array, "*rows E"]) -> Float[Array, "*rows E"]:
    """x / |x|, as torch's `normalize`: a row shorter than 1e-12 is divided by that."""
    square = jnp.sum(jnp.square(x), axis=-1, keepdims=True)
    return x * jax.lax.rsqrt(jnp.maximum(square, 1e-24))
