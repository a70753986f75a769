"""The task of a config."""

from __future__ import annotations

from aimv2_jax.config.schema import Config
from aimv2_jax.train.distill_task import build_distill_task
from aimv2_jax.train.lit_task import build_lit_task
from aimv2_jax.train.pretrain_task import build_pretrain_task
from aimv2_jax.train.task import ModelTask


def build_task(config: Config, platform: str = "cpu") -> ModelTask:
    """Builds the task of a config for devices of a platform.

    Raises:
      UserError: if the config requests attention kernels that the platform or the head size does not support.
    """
    builders = {"pretrain": build_pretrain_task, "lit": build_lit_task, "distill": build_distill_task}
    return builders[config.task](config, platform)
