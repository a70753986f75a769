"""Token frequencies of the training captions, and their unigram entropy."""

from __future__ import annotations

from collections.abc import Iterator

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from aimv2_jax.config.schema import Config, mixture_counts
from aimv2_jax.data import records
from aimv2_jax.data.records import BadRecord
from aimv2_jax.data.sources import Source, open_datasets
from aimv2_jax.data.tokenizer import Tokenizer
from aimv2_jax.data.transforms import captions
from aimv2_jax.train.losses import text_loss_mask

# Evenly spaced captions that are read of each source and kind. A sample of few tokens biases the entropy downwards by
# about (V - 1) / (2 x tokens): 0.01 nats for 32,000 pieces and captions of 16 tokens.
MAX_CAPTIONS = 100_000
_CHUNK = 1000  # Captions tokenised at a time.


def entropy(frequencies: Float[np.ndarray, " V"]) -> float | None:
    """Entropy in nats of a token drawn in proportion to `frequencies`; None if they are all zero."""
    if not np.sum(frequencies):
        return None
    shares = frequencies[frequencies > 0] / np.sum(frequencies)
    return float(-np.sum(shares * np.log(shares)))


def token_frequencies(config: Config, tokenizer: Tokenizer) -> dict[str, Float[np.ndarray, " V"]]:
    """Mean count of each token per training example, by caption kind, weighted by the mixture.

    Counts the tokens of the text loss, with `predict_eos` also the end token. Unusable captions are skipped.
    """
    frequencies: dict[str, np.ndarray] = {}
    sources = open_datasets(config.data.sources)
    for name, kinds in mixture_counts(config.data.mixture).items():
        for kind, weight in kinds.items():
            count, texts = np.zeros(config.model.decoder.vocab_size), 0
            for chunk in _chunks(sources[name], kind):
                tokens, token_valid = tokenizer.encode(chunk)
                is_example = jnp.ones(len(chunk), bool)
                loss_mask = np.asarray(text_loss_mask(jnp.asarray(token_valid), is_example, config.loss.predict_eos))
                count += np.bincount(tokens[loss_mask], minlength=len(count))
                texts += len(chunk)
            frequencies[kind] = frequencies.get(kind, 0) + weight * count / max(texts, 1)
    return frequencies


def _chunks(source: Source, kind: str) -> Iterator[list[bytes]]:
    """Yields a source's usable captions, cleaned, in UTF-8: one per record, rotating among several as in training."""
    chunk = []
    indices = np.unique(np.linspace(0, len(source) - 1, min(len(source), MAX_CAPTIONS)).astype(int))
    for turn, index in enumerate(indices):
        try:
            if texts := records.decode(source.read(int(index))).texts(kind):
                chunk.append(captions.clean(texts[turn % len(texts)]).encode())
        except BadRecord:
            continue
        if len(chunk) == _CHUNK:
            yield chunk
            chunk = []
    if chunk:
        yield chunk
