"""Encoder and decoder as one model for pre-training. B batch, L patches, P pixels a patch, T text, V vocabulary."""

from __future__ import annotations

from collections.abc import Collection
from typing import Literal, NamedTuple

import jax
from flax import linen as nn
from jaxtyping import Array, Bool, Float, Int

from aimv2_jax.models.decoder import Decoder
from aimv2_jax.models.encoder import Encoder

Output = Literal["pixels", "logits"]


class Predictions(NamedTuple):
    """What the decoder says, M = L - 1 rows of pixels; None where it was not asked."""

    pixels: Float[Array, "B M P"] | None
    logits: Float[Array, "B T V"] | None


class AIMv2(nn.Module):
    """The encoder under a prefix mask, the decoder over its features and the caption."""

    encoder: Encoder
    decoder: Decoder

    def __call__(
        self,
        patches: Float[Array, "B L P"],
        coords: Int[Array, "B L 2"],
        valid: Bool[Array, "B L"],
        tokens: Int[Array, "B T"],
        prefix: Int[Array, " B"] | None,
        outputs: Collection[Output] = ("pixels", "logits"),
    ) -> Predictions:
        """Predictions of patches 1 … L-1 and of tokens 0 … T-1, float32; rows that predict nothing are not computed."""
        num_patches = patches.shape[1]
        features, _ = self.encoder(patches, coords, valid, prefix)
        rows, _ = self.decoder(features, valid, tokens[:, :-1] if "logits" in outputs else None)
        pixels = self.decoder.predict_pixels(rows[:, : num_patches - 1]) if "pixels" in outputs else None
        logits = self.decoder.predict_tokens(rows[:, num_patches:]) if "logits" in outputs else None
        return Predictions(pixels, logits)


def count_parameters(params: object) -> int:
    """Numbers in a tree of arrays or shapes."""
    return sum(leaf.size for leaf in jax.tree.leaves(params))
