"""Captions written greedily, one row of the decoder a token.

B batch, L patches, P pixels a patch, T text, R = L + T rows kept, V vocabulary, D width, N layers.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from aimv2_jax.models.aimv2 import AIMv2
from aimv2_jax.models.attention import causal_reads
from aimv2_jax.models.layers import Cache

Params = Any


class Context(NamedTuple):
    """What the decoder has read: keys and values of its rows by layer, and which of all R rows may be read."""

    cache: Cache
    readable: Bool[Array, "B R"]


class Captions(NamedTuple):
    """Texts as tokens. `lengths` counts those before the end; after the end `tokens` repeats it.

    A text that did not end within T tokens has length T.
    """

    tokens: Int[Array, "B T"]
    lengths: Int[Array, " B"]


def read_pictures(
    model: AIMv2,
    params: Params,
    pixels: Float[Array, "B L P"],
    coords: Int[Array, "B L 2"],
    valid: Bool[Array, "B L"],
    max_tokens: int,
) -> tuple[Float[Array, "B V"], Context]:
    """Logits of the first token, and the context for those that follow, with room for `max_tokens`.

    The encoder attends fully. Padded patches are rows that nobody reads.
    """
    return model.apply({"params": params}, pixels, coords, valid, max_tokens, method=_read_pictures)


def read_token(
    model: AIMv2, params: Params, context: Context, token_B: Int[Array, " B"], index: Int[Array, ""]
) -> tuple[Float[Array, "B V"], Context]:
    """Logits of token `index + 1`, given token `index` and the context of all before it: one row is computed."""
    return model.apply({"params": params}, context, token_B, index, method=_read_token)


def read_caption(model: AIMv2, params: Params, context: Context, tokens: Int[Array, "B T"]) -> Float[Array, "B T V"]:
    """Logits of the token after each of `tokens`, which follow the pictures of the context at once."""
    return model.apply({"params": params}, context, tokens, method=_read_caption)


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
    """The likeliest token at each place, until all texts have ended; to be called within `jax.jit`.

    Args:
      model: encoder and decoder.
      params: of the model.
      pixels: normalised, as the model reads them.
      coords: row and column of each patch.
      valid: False on padding; a row without a valid patch gets no text.
      end_id: the token that ends a text; None: all are `max_tokens` long.
      max_tokens: T, the end included; as many as the decoder has learned to write, unless given.
      num_pieces: tokens that may be chosen, where the tokenizer has fewer than the model's table.
    """
    max_tokens = max_tokens or model.text_decoder.text_length
    logits, context = read_pictures(model, params, pixels, coords, valid, max_tokens)
    filling = 0 if end_id is None else end_id
    ended = ~jnp.any(valid, axis=1)
    tokens = jnp.full((pixels.shape[0], max_tokens), filling, jnp.int32)

    def write(index, logits, tokens, lengths, ended):
        token = jnp.where(ended, filling, jnp.argmax(logits[:, :num_pieces], axis=-1).astype(jnp.int32))
        ended = ended if end_id is None else ended | (token == end_id)
        return token, tokens.at[:, index].set(token), lengths + ~ended, ended

    def goes_on(carry):
        index, _, _, _, ended, _ = carry
        return (index < max_tokens - 1) & ~jnp.all(ended)

    def step(carry):
        index, token, tokens, lengths, ended, context = carry
        logits, context = read_token(model, params, context, token, index)
        return index + 1, *write(index + 1, logits, tokens, lengths, ended), context

    first = write(0, logits, tokens, jnp.zeros_like(ended, jnp.int32), ended)
    _, _, tokens, lengths, _, _ = jax.lax.while_loop(goes_on, step, (jnp.int32(0), *first, context))
    return Captions(tokens, lengths)


def _read_pictures(model: AIMv2, pixels, coords, valid, max_tokens):
    decoder = model.text_decoder
    features, _ = model.encoder(pixels, coords, valid)
    rows = jnp.concatenate(
        [decoder.embed_image(features), decoder.embed_text(jnp.zeros((pixels.shape[0], 0), jnp.int32))], axis=1
    )
    # The begin row and every text row but the last, which is never read.
    readable = jnp.concatenate([valid, jnp.ones((pixels.shape[0], max_tokens), bool)], axis=1)
    empty = jnp.zeros((decoder.depth, *readable.shape, decoder.width), decoder.precision.compute)
    cache = Cache(empty, empty, jnp.zeros(decoder.depth, jnp.int32))
    rows, _, cache = decoder.trunk(rows, causal_reads(readable), cache)
    return decoder.predict_tokens(rows[:, -1:])[:, 0], Context(cache, readable)


def _read_caption(model: AIMv2, context, tokens):
    decoder, (cache, readable) = model.text_decoder, context
    rows = decoder.embed_text(tokens)[:, 1:]  # The begin row has been read.
    rows, _, _ = decoder.trunk(rows, causal_reads(readable, first=cache.index[0]), cache)
    return decoder.predict_tokens(rows)


def _read_token(model: AIMv2, context, token_B, index):
    decoder, (cache, readable) = model.text_decoder, context
    reads = causal_reads(readable, first=cache.index[0])
    rows, _, cache = decoder.trunk(decoder.embed_token(token_B, index), reads, cache)
    return decoder.predict_tokens(rows)[:, 0], Context(cache, readable)
