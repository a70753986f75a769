"""How likely captions are, given pictures: the model as a captioner that reads instead of writing.

B pictures, C captions, L patches, T text, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from aimv2_jax.data import captions as texts
from aimv2_jax.data.records import BadRecord
from aimv2_jax.errors import UserError
from aimv2_jax.eval.encoders import LoadedEncoder
from aimv2_jax.eval.generate import read_caption, read_pictures
from aimv2_jax.eval.images import ImageLike
from aimv2_jax.eval.load import Loaded
from aimv2_jax.export.vision import vision_of
from aimv2_jax.models.aimv2 import AIMv2
from aimv2_jax.train import losses


class Scorer:
    """Log-likelihoods of captions by a model's decoder, in nats; the encoder attends fully.

    Raises:
      UserError: where the model writes no text.
    """

    def __init__(self, loaded: Loaded):
        if "text" not in loaded.task.weights:
            raise UserError("the model was not trained to write text", loaded.name, "Give one with loss.text")
        self._loaded, self._tokenizer = loaded, loaded.tokenizer()
        self.eyes = LoadedEncoder(
            loaded.name, vision_of(loaded.config), {"encoder": loaded.params["encoder"]}, loaded.mesh
        )

    def encode(self, captions: Sequence[str]) -> tuple[Int[np.ndarray, "C T"], Bool[np.ndarray, "C T"]]:
        """Tokens of captions as the model learned them, and which of them count: the end, too, where it was learned.

        Raises:
          UserError: for one in which there is nothing.
        """
        tokens, valid = self._tokenizer.encode([_clean(caption).encode() for caption in captions])
        predict_eos = self._loaded.task.predict_eos
        return tokens, np.asarray(losses.counted_tokens(jnp.asarray(valid), jnp.ones(len(valid), bool), predict_eos))

    def __call__(
        self, images: Sequence[ImageLike], tokens: Int[np.ndarray, "C T"], counted: Bool[np.ndarray, "C T"]
    ) -> Float[np.ndarray, "B C"]:
        """The log-likelihood of every caption for every picture, the sum over its counted tokens."""
        found = []
        for batch, grids in self.eyes.batches(images):
            scores = self._score(self._loaded.params, batch, jnp.asarray(tokens), jnp.asarray(counted))
            found.append(np.asarray(scores)[:, : len(grids)].T)
        return np.concatenate(found)

    @cached_property
    def _score(self) -> Any:
        return jax.jit(partial(_scores, self._loaded.task.model, self._loaded.task.normalise))


def _clean(caption: str) -> str:
    try:
        return texts.clean(caption)
    except BadRecord as error:
        raise UserError("a caption without a letter", caption, "Leave it out") from error


def _scores(
    model: AIMv2, normalise: Any, params: Any, batch: dict[str, Array], tokens: Array, counted: Array
) -> Float[Array, "C B"]:
    """A caption at a time, so that logits of all of them are never there at once; pictures are read once."""
    length = tokens.shape[1]
    first, context = read_pictures(model, params, normalise(batch), batch["coords"], batch["valid"], length)
    rows = len(first)

    def one(caption: tuple[Array, Array]) -> Float[Array, " B"]:
        tokens_T, counted_T = caption
        given = jnp.broadcast_to(tokens_T[:-1], (rows, length - 1))
        logits = jnp.concatenate([first[:, None], read_caption(model, params, context, given)], axis=1)
        picked = jnp.take_along_axis(logits, jnp.broadcast_to(tokens_T, (rows, length))[..., None], axis=2)[..., 0]
        return jnp.sum(jnp.where(counted_T, picked - jax.nn.logsumexp(logits, axis=-1), 0), axis=1)

    return jax.lax.map(one, (tokens, counted))
