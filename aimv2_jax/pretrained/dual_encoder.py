"""Pretrained image encoder and text tower with embeddings in one space (`load_dual_encoder`).

N images or texts, B batch, L patches, T text tokens, D width, E embedding.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util
from jaxtyping import Array, Float, Int

from aimv2_jax.checkpoint.checkpointer import WeightChoice
from aimv2_jax.data.tokenizer import Tokenizer
from aimv2_jax.errors import UserError
from aimv2_jax.models.dual_encoder import DualEncoder
from aimv2_jax.models.layers import Precision
from aimv2_jax.models.text_tower import first_index
from aimv2_jax.parallel import rules
from aimv2_jax.platforms import skip_absent_tpu
from aimv2_jax.pretrained.dual_encoder_spec import DualEncoderSpec
from aimv2_jax.pretrained.encoder import PretrainedEncoder, encoder_of
from aimv2_jax.pretrained.images import ImageLike
from aimv2_jax.pretrained.lazy_weights import LazyWeights
from aimv2_jax.pretrained.source import open_dual_weights
from aimv2_jax.pretrained.texts import clean_text

_BATCH_TEXTS = 256


def load_dual_encoder(
    spec: str | Path,
    dtype: Literal["float32", "bfloat16"] = "float32",
    image_size: int | None = None,
    heads: int | None = None,
    weights: WeightChoice = "average",
) -> PretrainedDualEncoder:
    """Loads a model with a text tower: a LiT run, its export, a Hugging Face `Aimv2Model` folder, or Apple's file.

    Args:
      spec: the weights, see `pretrained.source.open_dual_weights`.
      dtype: dtype of the towers' computation.
      image_size: side of the centre square, in place of the model's own; learned positions are resized.
      heads: attention heads of the image encoder, for a .safetensors file without a config.
      weights: "average": averaged parameters if the run kept them; "raw": those of the step.

    Raises:
      UserError: for unreadable weights or an unusable tokenizer, or a size that the model does not support.
    """
    skip_absent_tpu()
    return dual_encoder_of(open_dual_weights(spec, heads, weights), dtype, image_size)


def dual_encoder_of(
    weights: LazyWeights[DualEncoderSpec], dtype: str = "float32", image_size: int | None = None
) -> PretrainedDualEncoder:
    """Like `load_dual_encoder`, for weights that are already open, such as `source.in_memory` has them."""
    spec = weights.spec
    image_shapes = {name: shape for name, shape in weights.shapes.items() if name.startswith(("encoder/", "head/"))}
    encoder = encoder_of(dataclasses.replace(weights, spec=spec.image, shapes=image_shapes), dtype, image_size)
    other = traverse_util.unflatten_dict(weights.read(weights.shapes.keys() - image_shapes.keys()), sep="/")
    params = {**encoder.params, **jax.device_put(other, rules.replicated(encoder.mesh))}
    spec = dataclasses.replace(spec, image=encoder.spec)
    tokenizer = None if weights.tokenizer is None else _tokenizer(weights.tokenizer, spec)
    return PretrainedDualEncoder(encoder, spec, params, tokenizer)


def _tokenizer(path: Path, spec: DualEncoderSpec) -> Tokenizer:
    """The text tower's tokenizer; raises `UserError` for one with another end token."""
    text = spec.text
    tokenizer = Tokenizer(str(path), text.length, text.vocab_size, False, always_end=True, section="text_config")
    if tokenizer.end_id != text.end_id:
        what = f"the tokenizer {path} has another end token than the text tower, {text.end_id}"
        raise UserError(what, tokenizer.end_id, "Put the model's own tokenizer there")
    return tokenizer


@dataclasses.dataclass(frozen=True)
class PretrainedDualEncoder:
    """Maps images and texts to embeddings of length 1, float32.

    Logits of an image and a text are `logit_scale` · image · text, plus `logit_bias` for a sigmoid loss. `params` has
    those of `encoder` too; they are replicated on `encoder.mesh`.
    """

    encoder: PretrainedEncoder
    spec: DualEncoderSpec
    params: Mapping[str, Any]
    tokenizer: Tokenizer | None = None

    def image_embeddings(self, images: Sequence[ImageLike], batch_size: int | None = None) -> Float[np.ndarray, "N E"]:
        """Embeddings of images of any size, as `PretrainedEncoder` takes them.

        Raises:
          UserError: for an item that is not an image.
        """
        parts = [
            np.asarray(self.embed_images(**batch))[: len(grids)]
            for batch, grids in self.encoder.batches(images, batch_size)
        ]
        return np.concatenate([np.zeros((0, self.spec.embed_dim), np.float32), *parts])

    def text_embeddings(self, texts: Sequence[str], batch_size: int = _BATCH_TEXTS) -> Float[np.ndarray, "N E"]:
        """Embeddings of texts, cleaned as captions are in training, and cut to the tower's length with the end token.

        Raises:
          UserError: for a single text in place of a list, a text without a letter, or a model without a tokenizer.
        """
        if isinstance(texts, str):
            raise UserError("a single text in place of a list", texts, "Give [text]")
        if self.tokenizer is None:
            remedy = "Put its tokenizer.json into its folder, or give tokens to text_embeddings_of_tokens"
            raise UserError("the model has no tokenizer", self.encoder.source, remedy)
        tokens, _ = self.tokenizer.encode([clean_text(text).encode() for text in texts])
        return self.text_embeddings_of_tokens(tokens, batch_size)

    def text_embeddings_of_tokens(
        self, tokens: Int[np.ndarray, "N T"], batch_size: int = _BATCH_TEXTS
    ) -> Float[np.ndarray, "N E"]:
        """Embeddings of rows of tokens, each of the row's first end token; what follows it changes nothing.

        Raises:
          UserError: for rows that are too long or have no end token, or a token that is not in the vocabulary.
        """
        text, (count, length) = self.spec.text, tokens.shape
        if length > text.length:
            raise UserError(
                "the texts have more tokens than the text tower has positions", length, f"Cut to {text.length}"
            )
        if count and not 0 <= tokens.min() <= tokens.max() < text.vocab_size:
            raise UserError(
                f"a token is not in the vocabulary of {text.vocab_size}", int(tokens.max()), "Fix the tokens"
            )
        without_end = np.flatnonzero(~(tokens == text.end_id).any(axis=1))
        if len(without_end):
            what = f"{len(without_end)} texts have no end token {text.end_id}, such as that of row"
            raise UserError(what, int(without_end[0]), "End every text")
        parts = [np.zeros((0, self.spec.embed_dim), np.float32)]
        for start in range(0, count, batch_size):
            rows = tokens[start : start + batch_size]
            # A few texts get a smaller batch; larger calls are padded, so that they compile once.
            padded = batch_size if start or len(rows) > batch_size // 2 else len(rows)
            padded = -(-padded // self.encoder.mesh.size) * self.encoder.mesh.size
            batch = np.full((padded, length), text.end_id, np.int32)
            batch[: len(rows)] = rows
            on_devices = jax.device_put(batch, rules.batch_sharding(self.encoder.mesh))
            parts.append(np.asarray(self.embed_tokens(on_devices))[: len(rows)])
        return np.concatenate(parts)

    @property
    def logit_scale(self) -> float:
        """The factor of the logits, from 1 to 100."""
        return float(self._model.apply({"params": self.params}, method=DualEncoder.scale))

    @property
    def logit_bias(self) -> float:
        """The bias of the logits: 0 for a softmax loss."""
        return float(self.params.get("logit_bias", 0.0))

    def embed_images(self, patches: Array, coords: Array, valid: Array) -> Float[Array, "B E"]:
        """Embeddings of a batch of images on the devices, with the arrays of docs/architecture.md, "Batch"."""
        return self._embed_images(self.params, self.encoder.features(patches, coords, valid), valid)

    def embed_tokens(self, tokens: Int[Array, "B T"]) -> Float[Array, "B E"]:
        """Embeddings of a batch of texts on the devices, each with an end token."""
        return self._embed_tokens(self.params, tokens)

    @cached_property
    def _model(self) -> DualEncoder:
        return self.spec.model(precision=Precision(compute=jnp.dtype(self.encoder.dtype)))

    @cached_property
    def _embed_images(self) -> Any:
        def embed(params: Any, features: Array, valid: Array) -> Array:
            return self._model.apply({"params": params}, features, valid, method=DualEncoder.embed_features)

        return jax.jit(embed)

    @cached_property
    def _embed_tokens(self) -> Any:
        def embed(params: Any, tokens: Array) -> Array:
            end_index = first_index(tokens == self.spec.text.end_id)
            with jax.default_matmul_precision("highest" if self.encoder.dtype == "float32" else "default"):
                return self._model.apply({"params": params}, tokens, end_index, method=DualEncoder.text_embedding)

        return jax.jit(embed)
