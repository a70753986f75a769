"""Model FLOPs with attention counted only over the pairs that the masks allow."""

from __future__ import annotations

from aimv2_jax.config.schema import Config
from aimv2_jax.monitoring.flops import Mask, flops_per_example, model_runs


def flops_of_allowed_pairs(config: Config) -> float:
    """`flops_per_example` with attention counted by the pairs of query and key that the mask allows.

    For the first of the config's batch shapes, without padding. The encoder's prefix is uniform on {1 … L-1}
    (`losses.sample_prefix`); the result is the mean over it. Decoders and text towers are causal.
    """
    length = config.batch_shapes[0].patches
    forbidden = 0.0
    for run in model_runs(config, length):
        for trunk, rows, mask, passes in run.trunks:
            forbidden += passes * trunk.depth * trunk.width * _forbidden_pairs(rows, mask)
    # Two products, 2 FLOPs a multiply-add.
    return flops_per_example(config, length) - 2 * 2 * forbidden


def _forbidden_pairs(rows: int, mask: Mask) -> float:
    above_diagonal = rows * (rows - 1) / 2
    # Σ_p p (p - 1) / 2 over p = 1 … L-1, divided by L - 1, is L (L - 2) / 6: the pairs above it within the prefix.
    return {"full": 0.0, "causal": above_diagonal, "prefix": above_diagonal - rows * (rows - 2) / 6}[mask]
