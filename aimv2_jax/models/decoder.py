"""The causal decoder over [image features | begin | text].

B batch, L patches, M = L - 1, T text, S sequence, D width, C encoder width, R rows, P pixels a patch, V vocabulary,
N layers.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Literal, NamedTuple

import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Bool, Float, Int

from aimv2_jax.models.attention import causal_reads
from aimv2_jax.models.layers import (
    POSITION_AXES,
    TABLE_AXES,
    Linear,
    Precision,
    Run,
    Trunk,
    add,
    look_up,
    named,
    symmetric_uniform,
)

Output = Literal["pixels", "logits"]


class Predictions(NamedTuple):
    """What a decoder says of the next patches and tokens; None where it was not asked, or cannot say."""

    pixels: Float[Array, "B M P"] | None
    logits: Float[Array, "B T V"] | None


class Decoder(nn.Module):
    """One trunk for both modalities; a linear head for pixels, another for tokens (RECIPE.md §3).

    Image row i predicts patch i+1; the begin row predicts token 0, text row j token j+1. The caller slices the rows
    whose predictions it wants and hands them to `predict_pixels` or `predict_tokens`; `predict` does so for all.
    """

    width: int
    depth: int
    heads: int
    hidden: int
    encoder_width: int
    pixels: int
    vocab_size: int
    text_length: int
    eps: float = 1e-5
    precision: Precision = Precision()
    run: Run = Run()
    reads_text: bool = True  # False: it has no parameters of text, and is asked for pixels alone.

    def setup(self):
        param = self.precision.param
        image_init = symmetric_uniform(self.encoder_width)
        self.image_embed = Linear(
            self.width, ("features", "output"), self.precision, kernel_init=image_init, bias_init=image_init
        )
        if self.reads_text:
            self.token_table = self.param(
                "token_table", named(nn.initializers.normal(0.02), *TABLE_AXES), (self.vocab_size, self.width), param
            )
            self.begin = self.param(
                "begin", named(nn.initializers.normal(0.02), "position_embed"), (self.width,), param
            )
            self.position = self.param(
                "position",
                named(nn.initializers.normal(0.01), *POSITION_AXES),
                (self.text_length + 1, self.width),
                param,
            )
        self.trunk = Trunk(self.depth, self.heads, self.hidden, self.eps, self.precision, self.run)
        # Variance 1 / ((1 + blocks) · in): the reference's heads start small in proportion to their depth.
        head_init = nn.initializers.variance_scaling(1 / (1 + self.depth), "fan_in", "truncated_normal")
        self.pixel_head = Linear(
            self.pixels, ("embed", "pixels"), self.precision, kernel_init=head_init, out_dtype=jnp.float32
        )
        self.token_head = Linear(
            self.vocab_size, ("embed", "vocab"), self.precision, kernel_init=head_init, out_dtype=jnp.float32
        )

    def embed_image(self, features: Float[Array, "B L C"]) -> Float[Array, "B L D"]:
        """Features as decoder rows; no position is added to them."""
        return self.image_embed(features)

    def embed_text(self, tokens: Int[Array, "B T"]) -> Float[Array, "B R D"]:
        """[begin | tokens] plus their positions."""
        rows = self._look_up(tokens)
        rows = jnp.pad(rows, ((0, 0), (1, 0), (0, 0)))
        table = self.position.at[0].add(self.begin)
        return add(rows, table[: rows.shape[1]], POSITION_AXES, self.precision.reduce)

    def embed_token(self, token_B: Int[Array, " B"], index: Int[Array, ""]) -> Float[Array, "B 1 D"]:
        """The row of text token number `index`, for generation."""
        compute = self.precision.compute
        rows = self._look_up(token_B[:, None])[:, 0]
        return (rows + jnp.take(self.position, index + 1, axis=0).astype(compute))[:, None]

    def _look_up(self, tokens: Int[Array, "B T"]) -> Float[Array, "B T D"]:
        return look_up(self.token_table, tokens, self.precision.compute, self.precision.reduce)

    def predict_pixels(self, rows: Float[Array, "B R D"]) -> Float[Array, "B R P"]:
        """Normalised next patches, float32."""
        return self.pixel_head(rows)

    def predict_tokens(self, rows: Float[Array, "B R D"]) -> Float[Array, "B R V"]:
        """Logits of the next token, float32."""
        return self.token_head(rows)

    def __call__(
        self,
        features: Float[Array, "B L C"],
        valid: Bool[Array, "B L"],
        tokens: Int[Array, "B T"] | None,
        collect: bool = False,
    ) -> tuple[Float[Array, "B S D"], Float[Array, "N B S D"] | None]:
        """Rows of [image | begin | tokens] after the final norm, and after every block (`collect`).

        `tokens` are those that are read: the last token of a caption predicts nothing and need not be given. Padded
        text trails and masks nothing; padded image rows do not trail and are masked as keys.
        """
        rows = self.embed_image(features)
        if tokens is not None:
            text = self.embed_text(tokens)
            rows = jnp.concatenate([rows, text], axis=1)
            valid = jnp.concatenate([valid, jnp.ones(text.shape[:2], bool)], axis=1)
        rows, every, _ = self.trunk(rows, causal_reads(valid), collect=collect)
        return rows, every

    def predict(
        self,
        features: Float[Array, "B L C"],
        coords: Int[Array, "B L 2"],
        valid: Bool[Array, "B L"],
        tokens: Int[Array, "B T"],
        outputs: Collection[Output],
    ) -> Predictions:
        """Predictions of patches 1 … L-1 and of tokens 0 … T-1, float32; rows that predict nothing are not computed.

        `coords` are not read: the features know their places.
        """
        length = features.shape[1]
        rows, _ = self(features, valid, tokens[:, :-1] if "logits" in outputs else None)
        pixels = self.predict_pixels(rows[:, : length - 1]) if "pixels" in outputs else None
        logits = self.predict_tokens(rows[:, length:]) if "logits" in outputs else None
        return Predictions(pixels, logits)
