"""Shares traced and compiled programs between equal setups of one test file, since they dominate a start."""

from __future__ import annotations

import dataclasses
import json

import pytest

from aimv2_jax.config.load import config_to_dict
from aimv2_jax.config.schema import BatchShape, Config
from aimv2_jax.train import trainer
from aimv2_jax.train.builder import TrainSetup
from aimv2_jax.train.pretrain_task import PretrainTask

# Config sections that the programs do not depend on.
IGNORED_SECTIONS = {"eval", "processes", "watch", "init", "tokenizer"}


@pytest.fixture(scope="module")
def shared_programs():
    """Runs of equal configs share their traced functions and compiled steps within a test module.

    Tests may patch the task's `loss_sums` between runs, but no other part of the task, and nothing of the model.
    """
    build, compile_step = trainer.build_setup, TrainSetup.compile_step
    setups, compiled = {}, {}

    def build_shared(config: Config) -> TrainSetup:
        setup = build(config)
        sections = {name: value for name, value in config_to_dict(config).items() if name not in IGNORED_SECTIONS}
        sections["train"] = {name: sections["train"][name] for name in ("microbatches", "reduce_dtype")}
        if sections["distill"] is not None:
            sections["distill"].pop("path")
        sections["cooldown"] = config.cooldown and (config.cooldown.start, config.cooldown.steps)
        text = json.dumps(sections, sort_keys=True, default=str)
        cached = setups.setdefault((text, *setup.mesh.devices.flat, PretrainTask.loss_sums), setup)
        fields = {field.name for field in dataclasses.fields(TrainSetup)}
        vars(setup).update({name: value for name, value in vars(cached).items() if name not in fields})
        return setup

    def compile_shared(setup: TrainSetup, shape: BatchShape):
        key = (setup.step, shape)
        if key not in compiled:
            compiled[key] = compile_step(setup, shape)
        return compiled[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer, "build_setup", build_shared)
        patch.setattr(TrainSetup, "compile_step", compile_shared)
        yield
