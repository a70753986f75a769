"""Model FLOPs with attention counted only over the pairs that the masks allow."""

from __future__ import annotations

from aimv2_jax.config.schema import Config
from aimv2_jax.monitoring.flops import decoder_rows, flops_per_example


def flops_of_allowed_pairs(config: Config) -> float:
    """`flops_per_example` with attention counted by the pairs of query and key that the mask allows.

    For the first of the config's batch shapes, without padding. The encoder's prefix is uniform on {1 … L-1}
    (`losses.sample_prefix`); the result is the mean over it. Decoders are causal.
    """
    encoder, decoder = config.model.encoder, config.model.decoder
    length = config.batch_shapes[0].patches
    forbidden = 0
    if encoder.attention_mask == "prefix":
        # Σ_p p (p - 1) / 2 over p = 1 … L-1, divided by L - 1, is L (L - 2) / 6: the pairs above the diagonal.
        forbidden += encoder.depth * encoder.width * (_above(length) - length * (length - 2) / 6)
    for rows in decoder_rows(config, length):
        forbidden += decoder.depth * decoder.width * _above(sum(rows))
    # Two products, 2 FLOPs a multiply-add, forward and twice that backward.
    return flops_per_example(config, length) - 3 * 2 * 2 * forbidden


def _above(rows: int) -> float:
    """Pairs above the diagonal."""
    return rows * (rows - 1) / 2
