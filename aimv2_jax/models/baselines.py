"""Separate decoders for image and text. B batch, L patches, C encoder width, T text."""

from __future__ import annotations

from collections.abc import Collection

from flax import linen as nn
from jaxtyping import Array, Bool, Float, Int

from aimv2_jax.config.schema import Output
from aimv2_jax.models.decoder import Decoder, Predictions


class SeparateDecoders(nn.Module):
    """Two complete decoders over the same features. They share no parameters, so each loss trains only its own.

    The text decoder reads the features in the rows before the text, like the joint one, but predicts nothing there.
    """

    image: Decoder
    text: Decoder

    @property
    def pixels(self) -> int:
        """Number of values in a patch."""
        return self.image.pixels

    def predict(
        self,
        features: Float[Array, "B L C"],
        coords: Int[Array, "B L 2"],
        valid: Bool[Array, "B L"],
        tokens: Int[Array, "B T"],
        outputs: Collection[Output],
    ) -> Predictions:
        """See `Decoder.predict`; a decoder whose output is not requested does not run."""
        pixels = logits = None
        if "pixels" in outputs:
            pixels = self.image.predict(features, coords, valid, tokens, ("pixels",)).pixels
        if "logits" in outputs:
            logits = self.text.predict(features, coords, valid, tokens, ("logits",)).logits
        return Predictions(pixels, logits)
