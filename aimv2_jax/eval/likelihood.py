"""Log-likelihoods of captions given images, by the text decoder with teacher forcing.

B images, C captions, L patches, T text, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from aimv2_jax.errors import UserError
from aimv2_jax.eval.generate import caption_logits, prefill
from aimv2_jax.models.aimv2 import AIMv2
from aimv2_jax.pretrained.encoder import PretrainedEncoder
from aimv2_jax.pretrained.encoder_spec import encoder_spec_of
from aimv2_jax.pretrained.images import ImageLike
from aimv2_jax.pretrained.model import PretrainedModel
from aimv2_jax.pretrained.texts import clean_text
from aimv2_jax.train import losses


class Scorer:
    """Log-likelihoods of captions by a model's decoder, in nats; the encoder attends fully.

    Raises:
      UserError: for a model without a text loss.
    """

    def __init__(self, loaded: PretrainedModel):
        if "text" not in loaded.task.weights:
            raise UserError("the model was not trained to write text", loaded.name, "Give one with loss.text")
        self._loaded = loaded
        self._tokenizer = loaded.tokenizer()
        self.encoder = PretrainedEncoder(
            loaded.name, encoder_spec_of(loaded.config), {"encoder": loaded.params["encoder"]}, loaded.mesh
        )

    def encode(self, captions: Sequence[str]) -> tuple[Int[np.ndarray, "C T"], Bool[np.ndarray, "C T"]]:
        """Tokens of captions, cleaned as in training, and their loss mask; the end token counts if it was learned.

        Raises:
          UserError: for a caption without a letter.
        """
        tokens, valid = self._tokenizer.encode([clean_text(caption).encode() for caption in captions])
        predict_eos = self._loaded.task.predict_eos
        return tokens, np.asarray(losses.text_loss_mask(jnp.asarray(valid), jnp.ones(len(valid), bool), predict_eos))

    def __call__(
        self, images: Sequence[ImageLike], tokens: Int[np.ndarray, "C T"], loss_mask: Bool[np.ndarray, "C T"]
    ) -> Float[np.ndarray, "B C"]:
        """The log-likelihood of every caption for every image, summed over the tokens of its loss mask."""
        parts = []
        for batch, grids in self.encoder.batches(images):
            scores = self._score(self._loaded.params, batch, jnp.asarray(tokens), jnp.asarray(loss_mask))
            parts.append(np.asarray(scores)[:, : len(grids)].T)
        return np.concatenate(parts)

    @cached_property
    def _score(self) -> Any:
        return jax.jit(partial(_scores, self._loaded.task.model, self._loaded.task.normalise))


def _scores(
    model: AIMv2, normalise: Any, params: Any, batch: dict[str, Array], tokens: Array, loss_mask: Array
) -> Float[Array, "C B"]:
    """Scores one caption at a time, so that the logits of all are never in memory; images are encoded once."""
    length = tokens.shape[1]
    first, context = prefill(model, params, normalise(batch), batch["coords"], batch["valid"], length)
    rows = len(first)

    def score(caption: tuple[Array, Array]) -> Float[Array, " B"]:
        tokens_T, loss_mask_T = caption
        inputs = jnp.broadcast_to(tokens_T[:-1], (rows, length - 1))
        logits = jnp.concatenate([first[:, None], caption_logits(model, params, context, inputs)], axis=1)
        picked = jnp.take_along_axis(logits, jnp.broadcast_to(tokens_T, (rows, length))[..., None], axis=2)[..., 0]
        return jnp.sum(jnp.where(loss_mask_T, picked - jax.nn.logsumexp(logits, axis=-1), 0), axis=1)

    return jax.lax.map(score, (tokens, loss_mask))
