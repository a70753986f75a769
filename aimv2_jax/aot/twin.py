"""The shallow twin: the same step on the same mesh with a few layers of each kind, compiled in full for its cycles."""

from __future__ import annotations

import dataclasses

from aimv2_jax.config import Config

# A first and a last layer: what the compiler fuses across layers is there, too.
DEPTH = 2


def twin_config(config: Config, depth: int = DEPTH) -> Config:
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
    """The leading sizes that stacks of layers have in a config."""
    return frozenset({config.model.encoder.depth, config.model.decoder.depth})
