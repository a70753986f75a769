"""Causal decoder over [image features | begin | text].

B batch, L patches, M = L - 1, T text, S sequence, D width, C encoder width, R rows, P pixels a patch, V vocabulary,
N layers.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import NamedTuple

import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Bool, Float, Int

from aimv2_jax.config.schema import Output
from aimv2_jax.models import ops
from aimv2_jax.models.attention import causal_mask
from aimv2_jax.models.layers import Linear, Precision, Trunk, TrunkOptions, named, symmetric_uniform


class Predictions(NamedTuple):
    """Predicted next patches and tokens; None for an output that was not requested or that the decoder lacks."""

    pixels: Float[Array, "B M P"] | None
    logits: Float[Array, "B T V"] | None


class Decoder(nn.Module):
    """One trunk for both modalities with a linear head for pixels and one for tokens (RECIPE.md §3).

    Image row i predicts patch i+1; the begin row predicts token 0, text row j predicts token j+1. Callers slice the
    rows they need and pass them to `predict_pixels` or `predict_tokens`; `predict` does so for all rows.
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
    options: TrunkOptions = TrunkOptions()
    has_text: bool = True  # If False, the decoder has no text parameters and predicts pixels only.

    def setup(self):
        param = self.precision.param
        image_init = symmetric_uniform(self.encoder_width)
        self.image_embed = Linear(
            self.width, ("features", "output"), self.precision, kernel_init=image_init, bias_init=image_init
        )
        if self.has_text:
            self.token_table = self.param(
                "token_table",
                named(nn.initializers.normal(0.02), *ops.TOKEN_TABLE_AXES),
                (self.vocab_size, self.width),
                param,
            )
            self.begin = self.param(
                "begin", named(nn.initializers.normal(0.02), "position_embed"), (self.width,), param
            )
            self.position = self.param(
                "position",
                named(nn.initializers.normal(0.01), *ops.POSITION_AXES),
                (self.text_length + 1, self.width),
                param,
            )
        self.trunk = Trunk(self.depth, self.heads, self.hidden, self.eps, self.precision, self.options)
        # Variance 1 / ((1 + depth) · fan_in): the reference initialises the heads smaller for deeper decoders.
        head_init = nn.initializers.variance_scaling(1 / (1 + self.depth), "fan_in", "truncated_normal")
        self.pixel_head = Linear(
            self.pixels, ("embed", "pixels"), self.precision, kernel_init=head_init, out_dtype=jnp.float32
        )
        self.token_head = Linear(
            self.vocab_size, ("embed", "vocab"), self.precision, kernel_init=head_init, out_dtype=jnp.float32
        )

    def embed_image(self, features: Float[Array, "B L C"]) -> Float[Array, "B L D"]:
        """Projects features to decoder rows, without position embeddings."""
        return self.image_embed(features)

    def embed_text(self, tokens: Int[Array, "B T"]) -> Float[Array, "B R D"]:
        """Embeds [begin | tokens] and adds position embeddings."""
        rows = self._embed_tokens(tokens)
        rows = jnp.pad(rows, ((0, 0), (1, 0), (0, 0)))
        table = self.position.at[0].add(self.begin)
        return ops.add(rows, table[: rows.shape[1]], ops.POSITION_AXES, self.precision.reduce)

    def embed_token(self, token_B: Int[Array, " B"], index: Int[Array, ""]) -> Float[Array, "B 1 D"]:
        """Embeds the text token at position `index`, for generation."""
        compute = self.precision.compute
        rows = self._embed_tokens(token_B[:, None])[:, 0]
        return (rows + jnp.take(self.position, index + 1, axis=0).astype(compute))[:, None]

    def _embed_tokens(self, tokens: Int[Array, "B T"]) -> Float[Array, "B T D"]:
        return ops.embedding_lookup(self.token_table, tokens, self.precision.compute, self.precision.reduce)

    def predict_pixels(self, rows: Float[Array, "B R D"]) -> Float[Array, "B R P"]:
        """Returns the normalised next patches, float32."""
        return self.pixel_head(rows)

    def predict_tokens(self, rows: Float[Array, "B R D"]) -> Float[Array, "B R V"]:
        """Returns the logits of the next token, float32."""
        return self.token_head(rows)

    def __call__(
        self,
        features: Float[Array, "B L C"],
        valid: Bool[Array, "B L"],
        tokens: Int[Array, "B T"] | None,
        return_hidden_states: bool = False,
    ) -> tuple[Float[Array, "B S D"], Float[Array, "N B S D"] | None]:
        """Returns the rows of [image | begin | tokens] after the final norm, and after every block or None.

        The rows after every block are returned with `return_hidden_states`. `tokens` are the input tokens: the last
        token of a caption predicts nothing and can be omitted. Text padding is at the end and needs no mask; padded
        image rows are masked as keys.
        """
        rows = self.embed_image(features)
        if tokens is not None:
            text = self.embed_text(tokens)
            rows = jnp.concatenate([rows, text], axis=1)
            valid = jnp.concatenate([valid, jnp.ones(text.shape[:2], bool)], axis=1)
        rows, hidden_states, _ = self.trunk(rows, causal_mask(valid), return_hidden_states=return_hidden_states)
        return rows, hidden_states

    def predict(
        self,
        features: Float[Array, "B L C"],
        coords: Int[Array, "B L 2"],
        valid: Bool[Array, "B L"],
        tokens: Int[Array, "B T"],
        outputs: Collection[Output],
    ) -> Predictions:
        """Predicts patches 1 … L-1 and tokens 0 … T-1, float32; skips rows that predict nothing.

        `coords` is unused, because the features contain their positions.
        """
        length = features.shape[1]
        rows, _ = self(features, valid, tokens[:, :-1] if "logits" in outputs else None)
        pixels = self.predict_pixels(rows[:, : length - 1]) if "pixels" in outputs else None
        logits = self.predict_tokens(rows[:, length:]) if "logits" in outputs else None
        return Predictions(pixels, logits)
