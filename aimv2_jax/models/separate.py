"""A decoder for the picture, and another for the text. B batch, L patches, C encoder width, T text."""

from __future__ import annotations

from collections.abc import Collection

from flax import linen as nn
from jaxtyping import Array, Bool, Float, Int

from aimv2_jax.models.decoder import Decoder, Output, Predictions


class SeparateDecoders(nn.Module):
    """Two whole decoders over the same features: they share no parameter, so neither loss moves the other's.

    The text decoder reads the features as the joint one does, in the rows before its own; nothing is predicted there.
    """

    image: Decoder
    text: Decoder

    @property
    def pixels(self) -> int:
        """Numbers of a patch."""
        return self.image.pixels

    def predict(
        self,
        features: Float[Array, "B L C"],
        coords: Int[Array, "B L 2"],
        valid: Bool[Array, "B L"],
        tokens: Int[Array, "B T"],
        outputs: Collection[Output],
    ) -> Predictions:
        """As `Decoder.predict`; a decoder that isn't asked is not run."""
        pixels = logits = None
        if "pixels" in outputs:
            pixels = self.image.predict(features, coords, valid, tokens, ("pixels",)).pixels
        if "logits" in outputs:
            logits = self.text.predict(features, coords, valid, tokens, ("logits",)).logits
        return Predictions(pixels, logits)
