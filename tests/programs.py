"""Runs of one file that compute the same need not trace it again: most of what a start without a compile takes."""

from __future__ import annotations

import dataclasses
import json

import pytest

from aimv2_jax.config import Config, config_to_dict
from aimv2_jax.train import loop
from aimv2_jax.train.program import Program

# What a program does not depend on.
APART = {"eval", "processes", "watch", "init", "tokenizer"}


@pytest.fixture(scope="module")
def shared_programs():
    """While a file's tests run, programs of configs that compute the same share what they have traced.

    Not for tests that put something else into the model or the task between runs.
    """
    build, made = loop.build_program, {}

    def build_shared(config: Config) -> Program:
        program = build(config)
        sections = {name: value for name, value in config_to_dict(config).items() if name not in APART}
        sections["train"] = {name: sections["train"][name] for name in ("microbatches", "reduce_dtype")}
        sections["cooldown"] = repr(config.cooldown)
        twin = made.setdefault(json.dumps(sections, sort_keys=True, default=str), program)
        own = {field.name for field in dataclasses.fields(Program)}
        vars(program).update({name: value for name, value in vars(twin).items() if name not in own})
        return program

    loop.build_program = build_shared
    yield
    loop.build_program = build
