"""Greedy caption decoding with a key-value cache: one decoder row per token.

B batch, L patches, P pixels per patch, T text, R = L + T cached rows, V vocabulary, D width, N layers.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from aimv2_jax.models.aimv2 import AIMv2
from aimv2_jax.models.attention import causal_mask
from aimv2_jax.models.layers import Cache

Params = Any


class Context(NamedTuple):
    """Decoder state: cached keys and values by layer, and which of all R rows may be attended."""

    cache: Cache
    key_valid: Bool[Array, "B R"]


class Captions(NamedTuple):
    """Texts as tokens. `lengths` counts the tokens before the end token; after it `tokens` repeats the end token.

    A text that does not end within T tokens has length T.
    """

    tokens: Int[Array, "B T"]
    lengths: Int[Array, " B"]


def prefill(
    model: AIMv2,
    params: Params,
    pixels: Float[Array, "B L P"],
    coords: Int[Array, "B L 2"],
    valid: Bool[Array, "B L"],
    max_tokens: int,
) -> tuple[Float[Array, "B V"], Context]:
    """Logits of the first token, and the context for later ones with room for `max_tokens`.

    The encoder attends fully. Padded patches are masked.
    """
    return model.apply({"params": params}, pixels, coords, valid, max_tokens, method=_prefill)


def decode_step(
    model: AIMv2, params: Params, context: Context, token_B: Int[Array, " B"], index: Int[Array, ""]
) -> tuple[Float[Array, "B V"], Context]:
    """Logits of token `index + 1`, given token `index` and the context of all before it; computes one row."""
    return model.apply({"params": params}, context, token_B, index, method=_decode_step)


def caption_logits(model: AIMv2, params: Params, context: Context, tokens: Int[Array, "B T"]) -> Float[Array, "B T V"]:
    """Logits of the token after each of `tokens`, which directly follow the images of the context."""
    return model.apply({"params": params}, context, tokens, method=_caption_logits)


def greedy(
    model: AIMv2,
    params: Params,
    pixels: Float[Array, "B L P"],
    coords: Int[Array, "B L 2"],
    valid: Bool[Array, "B L"],
    end_id: int | None,
    max_tokens: int | None = None,
    num_pieces: int | None = None,
) -> Captions:
    """Decodes the most likely token at each position until all texts have ended; call it within `jax.jit`.

    Args:
      model: encoder and decoder.
      params: the model's parameters.
      pixels: normalised patches.
      coords: row and column of each patch.
      valid: False on padding; a row without a valid patch gets no text.
      end_id: the token that ends a text; None: every text is `max_tokens` long.
      max_tokens: T, including the end token; by default the decoder's text length.
      num_pieces: size of the tokenizer's vocabulary, where the model's table is larger.
    """
    max_tokens = max_tokens or model.text_decoder.text_length
    logits, context = prefill(model, params, pixels, coords, valid, max_tokens)
    pad_id = 0 if end_id is None else end_id
    ended = ~jnp.any(valid, axis=1)
    tokens = jnp.full((pixels.shape[0], max_tokens), pad_id, jnp.int32)

    def write(index, logits, tokens, lengths, ended):
        token = jnp.where(ended, pad_id, jnp.argmax(logits[:, :num_pieces], axis=-1).astype(jnp.int32))
        ended = ended if end_id is None else ended | (token == end_id)
        return token, tokens.at[:, index].set(token), lengths + ~ended, ended

    def unfinished(carry):
        index, _, _, _, ended, _ = carry
        return (index < max_tokens - 1) & ~jnp.all(ended)

    def step(carry):
        index, token, tokens, lengths, ended, context = carry
        logits, context = decode_step(model, params, context, token, index)
        return index + 1, *write(index + 1, logits, tokens, lengths, ended), context

    first = write(0, logits, tokens, jnp.zeros_like(ended, jnp.int32), ended)
    _, _, tokens, lengths, _, _ = jax.lax.while_loop(unfinished, step, (jnp.int32(0), *first, context))
    return Captions(tokens, lengths)


def _prefill(model: AIMv2, pixels, coords, valid, max_tokens):
    decoder = model.text_decoder
    features, _ = model.encoder(pixels, coords, valid)
    rows = jnp.concatenate(
        [decoder.embed_image(features), decoder.embed_text(jnp.zeros((pixels.shape[0], 0), jnp.int32))], axis=1
    )
    # The begin row and every text row but the last, which is never attended.
    key_valid = jnp.concatenate([valid, jnp.ones((pixels.shape[0], max_tokens), bool)], axis=1)
    empty = jnp.zeros((decoder.depth, *key_valid.shape, decoder.width), decoder.precision.compute)
    cache = Cache(empty, empty, jnp.zeros(decoder.depth, jnp.int32))
    rows, _, cache = decoder.trunk(rows, causal_mask(key_valid), cache)
    return decoder.predict_tokens(rows[:, -1:])[:, 0], Context(cache, key_valid)


def _caption_logits(model: AIMv2, context, tokens):
    decoder, (cache, key_valid) = model.text_decoder, context
    rows = decoder.embed_text(tokens)[:, 1:]  # The begin row is in the cache already.
    rows, _, _ = decoder.trunk(rows, causal_mask(key_valid, query_offset=cache.index[0]), cache)
    return decoder.predict_tokens(rows)


def _decode_step(model: AIMv2, context, token_B, index):
    decoder, (cache, key_valid) = model.text_decoder, context
    mask = causal_mask(key_valid, query_offset=cache.index[0])
    rows, _, cache = decoder.trunk(decoder.embed_token(token_B, index), mask, cache)
    return decoder.predict_tokens(rows)[:, 0], Context(cache, key_valid)
