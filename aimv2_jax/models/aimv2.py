"""Encoder and decoder as one model for pre-training.

B batch, L patches, D width, P pixels a patch, K kept rows, T text.
"""

from __future__ import annotations

from collections.abc import Collection

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Bool, Float, Int

from aimv2_jax.config.schema import Output
from aimv2_jax.models.baselines import SeparateDecoders
from aimv2_jax.models.decoder import Decoder, Predictions
from aimv2_jax.models.encoder import Encoder
from aimv2_jax.models.patch_mlp import PatchMLP


class AIMv2(nn.Module):
    """Encoder under a prefix mask, and a decoder that predicts from its features and the caption.

    The decoder is None in a model that is an encoder alone.
    """

    encoder: Encoder
    decoder: Decoder | SeparateDecoders | PatchMLP | None

    @property
    def text_decoder(self) -> Decoder:
        """The decoder that predicts captions."""
        decoder = self.decoder.text if isinstance(self.decoder, SeparateDecoders) else self.decoder
        assert isinstance(decoder, Decoder), f"{type(decoder).__name__} predicts no text"
        return decoder

    def __call__(
        self,
        patches: Float[Array, "B L P"],
        coords: Int[Array, "B L 2"],
        valid: Bool[Array, "B L"],
        tokens: Int[Array, "B T"],
        prefix: Int[Array, " B"] | None,
        outputs: Collection[Output] = ("pixels", "logits"),
        kept: Int[Array, "B K"] | None = None,
    ) -> Predictions:
        """Predicts patches 1 … L-1 and tokens 0 … T-1, float32, as far as `outputs` requests them.

        Args:
          kept: indices of the encoder rows that the decoder receives, by example; None for all. With a subset only text
            can be predicted.
        """
        return self.features_and_predictions(patches, coords, valid, tokens, prefix, outputs, kept)[1]

    def features_and_predictions(
        self,
        patches: Float[Array, "B L P"],
        coords: Int[Array, "B L 2"],
        valid: Bool[Array, "B L"],
        tokens: Int[Array, "B T"],
        prefix: Int[Array, " B"] | None,
        outputs: Collection[Output],
        kept: Int[Array, "B K"] | None = None,
    ) -> tuple[Float[Array, "B L D"], Predictions]:
        """The encoder's features of all patches, after its final norm, and the predictions of `__call__`."""
        features, _ = self.encoder(patches, coords, valid, prefix)
        if not outputs:
            return features, Predictions(None, None)
        assert self.decoder is not None, "an encoder alone predicts nothing"
        rows = features
        if kept is not None:
            assert "pixels" not in outputs
            rows, coords, valid = (take_rows(array, kept) for array in (features, coords, valid))
        return features, self.decoder.predict(rows, coords, valid, tokens, outputs)


def take_rows(array: Array, rows: Int[Array, "B K"]) -> Array:
    """Gathers the given rows of each example of [B, L, …]; returns [B, K, …]."""
    return jnp.take_along_axis(array, rows.reshape(*rows.shape, *[1] * (array.ndim - 2)), axis=1)


def count_parameters(params: object) -> int:
    """Total size of a tree of arrays or shapes."""
    return sum(leaf.size for leaf in jax.tree.leaves(params))
