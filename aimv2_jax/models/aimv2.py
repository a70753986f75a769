"""Encoder and decoder as one model for pre-training. B batch, L patches, P pixels a patch, K kept rows, T text."""

from __future__ import annotations

from collections.abc import Collection

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Bool, Float, Int

from aimv2_jax.models.decoder import Decoder, Output, Predictions
from aimv2_jax.models.encoder import Encoder
from aimv2_jax.models.patch_mlp import PatchMLP
from aimv2_jax.models.separate import SeparateDecoders


class AIMv2(nn.Module):
    """The encoder under a prefix mask, and what predicts from its features and the caption."""

    encoder: Encoder
    decoder: Decoder | SeparateDecoders | PatchMLP

    @property
    def text_decoder(self) -> Decoder:
        """The decoder that writes captions."""
        decoder = self.decoder.text if isinstance(self.decoder, SeparateDecoders) else self.decoder
        assert isinstance(decoder, Decoder), f"{type(decoder).__name__} writes no text"
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
        """Predictions of patches 1 … L-1 and of tokens 0 … T-1, float32, of those of the two that are asked for.

        Args:
          kept: the rows of the encoder that the decoder is given, by example; None for all. Only text can be predicted
            from some.
        """
        features, _ = self.encoder(patches, coords, valid, prefix)
        if kept is not None:
            assert "pixels" not in outputs
            features, coords, valid = (take_rows(array, kept) for array in (features, coords, valid))
        return self.decoder.predict(features, coords, valid, tokens, outputs)


def take_rows(array: Array, rows: Int[Array, "B K"]) -> Array:
    """[B, K, …]: the given rows of each example of [B, L, …]."""
    return jnp.take_along_axis(array, rows.reshape(*rows.shape, *[1] * (array.ndim - 2)), axis=1)


def count_parameters(params: object) -> int:
    """Numbers in a tree of arrays or shapes."""
    return sum(leaf.size for leaf in jax.tree.leaves(params))
