"""Reduced-depth proxy of a config: the same step and mesh with few layers, compiled in full to get cycle counts."""

from __future__ import annotations

import dataclasses

from aimv2_jax.config import Config

# Two layers (a first and a last), so that fusions across layers occur in the proxy too.
DEPTH = 2


def proxy_config(config: Config, depth: int = DEPTH) -> Config:
    """`config` with at most `depth` layers in encoder and decoder."""
    model = config.model
    return dataclasses.replace(
        config,
        model=dataclasses.replace(
            model,
            encoder=dataclasses.replace(model.encoder, depth=min(depth, model.encoder.depth)),
            decoder=dataclasses.replace(model.decoder, depth=min(depth, model.decoder.depth)),
        ),
    )


def stack_depths(config: Config) -> frozenset[int]:
    """Returns the leading sizes of stacked layer parameters in a config."""
    return frozenset({config.model.encoder.depth, config.model.decoder.depth})
