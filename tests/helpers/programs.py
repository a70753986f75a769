"""Shares traces between equal setups of one test file, since tracing dominates a start with cached compiles."""

from __future__ import annotations

import dataclasses
import json

import pytest

from aimv2_jax.config.load import config_to_dict
from aimv2_jax.config.schema import Config
from aimv2_jax.train import trainer
from aimv2_jax.train.builder import TrainSetup

# Config sections that the traced functions do not depend on.
IGNORED_SECTIONS = {"eval", "processes", "watch", "init", "tokenizer"}


@pytest.fixture(scope="module")
def shared_programs():
    """Setups of equal configs share their traced functions within a test module.

    Do not use it in tests that patch the model or the task between runs.
    """
    build = trainer.build_setup
    cache = {}

    def build_shared(config: Config) -> TrainSetup:
        setup = build(config)
        sections = {name: value for name, value in config_to_dict(config).items() if name not in IGNORED_SECTIONS}
        sections["train"] = {name: sections["train"][name] for name in ("microbatches", "reduce_dtype")}
        sections["cooldown"] = repr(config.cooldown)
        cached = cache.setdefault(json.dumps(sections, sort_keys=True, default=str), setup)
        fields = {field.name for field in dataclasses.fields(TrainSetup)}
        vars(setup).update({name: value for name, value in vars(cached).items() if name not in fields})
        return setup

    trainer.build_setup = build_shared
    yield
    trainer.build_setup = build
