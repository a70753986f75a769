"""Config of a tiny run: the quickstart's data, a model of a few thousand parameters, four patches per image."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import jax
import pytest

from aimv2_jax.config.load import load_config
from aimv2_jax.config.schema import Config

ROOT = Path(__file__).parents[2]
QUICKSTART = ROOT / "experiments/quickstart.py"
TINY = {
    "model.encoder.width": 32,
    "model.encoder.depth": 2,
    "model.encoder.heads": 2,
    "model.encoder.hidden": 64,
    "model.decoder.width": 16,
    "model.decoder.depth": 2,
    "model.decoder.heads": 2,
    "model.decoder.hidden": 32,
    "model.decoder.text_length": 12,
    "model.layers": "scan",  # Compiles faster than "loop", which tests of the step cover.
    "optimizer.warmup_steps": 1,
    "optimizer.schedule_steps": 100,
    "data.image_size": 28,
    "data.batch_size": 16,
    "data.workers": 0,
    "eval.batch_size": 64,
    "eval.max_examples": 40,
    "train.steps": 20,
    "train.log_every": 5,
    "train.eval_every": 0,
    "train.save_every": 10,
    "train.tensorboard": False,
}
# Changes of the tiny run for each task beside pre-training, as keywords of `overrides`. Tests that hold for all tasks
# are parametrised over `TASKS`. The teacher is no file: tests of steps draw its weights.
TASKS: dict[str, dict[str, object]] = {
    "pretrain": {},
    "lit": dict(
        task="lit",
        init__reinit="('encoder',)",  # Random features, without a file.
        lit__text__width=16,
        lit__text__depth=2,
        lit__text__heads=4,
        lit__text__hidden=32,
        lit__text__vocab_size=1024,
        lit__text__text_length=12,
        lit__embed_dim=16,
    ),
    "distill": dict(
        task="distill",
        distill__path="teacher",
        distill__encoder__width=48,
        distill__encoder__depth=1,
        distill__encoder__heads=4,
        distill__encoder__hidden=64,
        distill__decoder__width=32,
        distill__decoder__depth=1,
        distill__decoder__heads=4,
        distill__decoder__hidden=32,
        distill__pixels=1.0,
        distill__temperature=2.0,
    ),
}


@contextlib.contextmanager
def only_devices(count: int) -> Iterator[None]:
    """Limits `jax.devices()` to the first `count` local devices."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jax, "devices", lambda *_: jax.local_devices()[:count])
        yield


def overrides(**changes: object) -> list[tuple[str, str]]:
    """Returns the tiny run as config overrides; keys of `changes` have `__` instead of dots."""
    settings = TINY | {key.replace("__", "."): value for key, value in changes.items()}
    return [(key, str(value)) for key, value in settings.items()]


def tiny_config(**changes: object) -> Config:
    """Loads the config of the tiny run; `changes` as in `overrides`."""
    return load_config(QUICKSTART, overrides(**changes))


def tiny_arguments(workdir: Path, **changes: object) -> list[str]:
    """Returns the arguments of `aimv2_jax.main` for the tiny run."""
    flags = [f"--config.{key}={value}" for key, value in overrides(**changes)]
    return [f"--config={QUICKSTART}", f"--workdir={workdir}", *flags]
