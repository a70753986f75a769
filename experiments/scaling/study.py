"""Runs and folders of the scaling study (RECIPE.md §10).

Each size has one trunk with a half-cosine learning rate, and for every sample count a cooldown that branches off it, so
that a point of the study costs only an additional fifth of its samples. A point's samples are those of trunk and
cooldown together. The folder of a run is `SIZE/trunk` or `SIZE/cooldown_STEP`.
"""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path

import jax
from etils import epath

from aimv2_jax.config.load import load_config
from aimv2_jax.config.schema import Config
from aimv2_jax.errors import UserError
from aimv2_jax.models.aimv2 import count_parameters
from aimv2_jax.models.sizes import ENCODER_SIZES
from aimv2_jax.monitoring.flops import flops_per_example
from aimv2_jax.train.task import abstract_key
from aimv2_jax.train.tasks import build_task

EXPERIMENTS = Path(__file__).resolve().parents[1]

_PREFIX = "cooldown_"
# Keys that the study sets, and the flag that controls each.
_OWN_KEYS = {
    "data.batch_size": "--batch",
    "optimizer.schedule": "no flag: a trunk has a half cosine",
    "optimizer.schedule_steps": "--samples",
    "optimizer.end_lr": "no flag: a trunk ends at half its peak",
    "train.steps": "--samples",
    "train.keep_steps": "--samples",
    "train.cooldown_from": "--samples",
}


@dataclasses.dataclass(frozen=True)
class Study:
    """Sizes (of `ENCODER_SIZES`) x samples, on one experiment.

    `config` is the experiment: one for each size, with {size} replaced by its name, or one for all, with the encoder's
    size changed. `settings` are additional overrides of all runs. `scale` shrinks the study: samples by the
    factor, batch and warm-up steps by its square root, which is about how the critical batch size grows with samples.
    """

    config: str
    sizes: Sequence[str]
    samples: Sequence[int]
    batch: int
    settings: Mapping[str, object] = dataclasses.field(default_factory=dict)
    scale: float = 1.0


STUDIES = {
    # For two CPU cores, on the bundled images: few steps, so that each image is seen at most about 20 times. [O]
    "miniature": Study(
        str(EXPERIMENTS / "quickstart.py"),
        sizes=("nano", "micro", "tiny"),
        samples=(1024, 2048, 4096, 8192),
        batch=16,
        settings={
            "model.decoder.width": 128, "model.decoder.depth": 2, "model.decoder.heads": 2,
            "optimizer.warmup_steps": 20, "train.eval_every": 0, "train.save_every": 100, "train.tensorboard": False,
        },
    ),
    # The paper's §3.1: 300M to 3B parameters; one run for each size on 5 billion images, with seven cooldowns of
    # 500M to 6.4B samples [P; O: the five counts in between, each about 1.5 times the one before].
    "paper": Study(
        str(EXPERIMENTS / "pretrain.py:{size}"),
        sizes=("large", "huge", "1b", "3b"),
        samples=(500_000_000, 800_000_000, 1_200_000_000, 1_800_000_000, 2_800_000_000, 4_200_000_000, 6_400_000_000),
        batch=8192,
    ),
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Run:
    """A trunk or a cooldown: its folder, its validated config, and its `aimv2_jax.main` arguments."""

    size: str
    workdir: epath.Path
    config: Config
    arguments: Sequence[str]

    @property
    def name(self) -> str:
        return f"{self.size}/{self.workdir.name}"

    @property
    def steps(self) -> int:
        return self.config.train.steps

    @property
    def start(self) -> int:
        """Step of the trunk at which the run starts."""
        return 0 if self.config.cooldown is None else self.config.cooldown.start

    @property
    def samples(self) -> int:
        """Samples of all its steps, including the trunk's."""
        return self.steps * self.config.data.batch_size

    @property
    def flops(self) -> float:
        """FLOPs of all its steps, including the trunk's: the cost of a separate run."""
        return self.samples * flops_per_example(self.config)

    @cached_property
    def parameters(self) -> tuple[int, int]:
        return parameters(self.config)


def parameters(config: Config) -> tuple[int, int]:
    """Returns the parameter counts of the encoder and of the whole model."""
    shapes = jax.eval_shape(build_task(config).init, abstract_key())
    return count_parameters(shapes["encoder"]), count_parameters(shapes)


def plan(study: Study, workdir: epath.PathLike, overrides: Sequence[tuple[str, str]] = ()) -> list[Run]:
    """Returns all runs in order of dependency; `overrides` are (key, text) pairs for all runs.

    Raises:
      UserError: for invalid settings, before anything starts.
    """
    for key, text in overrides:
        if key in _OWN_KEYS:
            raise UserError(f"--config.{key} is set by the study", text, f"Leave it out; {_OWN_KEYS[key]}")
    if not 0 < study.scale < math.inf:
        raise UserError("--scale is out of range", study.scale, "Give a number above 0, such as 0.01")
    return [run for size in study.sizes for run in _runs(study, size, epath.Path(workdir) / size, overrides)]


def _runs(study: Study, size: str, folder: epath.Path, overrides: Sequence[tuple[str, str]]) -> Iterator[Run]:
    if size not in ENCODER_SIZES:
        raise UserError("--sizes: no such size", size, f"Choose among {', '.join(ENCODER_SIZES)}")
    file = os.path.relpath(study.config.replace("{size}", size))
    encoder = {} if "{size}" in study.config else dataclasses.asdict(ENCODER_SIZES[size])
    keys = {f"model.encoder.{key}": str(value) for key, value in encoder.items()}
    keys |= {key: str(value) for key, value in study.settings.items()} | dict(overrides)
    config = load_config(file, list(keys.items()))
    if not config.eval.sources:
        raise UserError("config eval.sources is empty", {}, "A point of the study is a held-out loss: name a dataset")
    root = math.sqrt(study.scale)
    batch = max(1, round(study.batch * root))
    share = config.optimizer.cooldown_share
    starts = [max(1, round(count * study.scale / batch * (1 - share))) for count in sorted(study.samples)]
    if len(set(starts)) < len(starts):
        remedy = "Give counts that are further apart, or a smaller --batch"
        raise UserError(f"--samples: with batches of {batch}, two are the same steps", list(study.samples), remedy)
    keys |= {
        "data.batch_size": str(batch),
        "optimizer.warmup_steps": str(round(config.optimizer.warmup_steps * root)),
        "optimizer.schedule": "half_cosine",
        "optimizer.schedule_steps": str(starts[-1]),
        "optimizer.end_lr": "0.0",  # The trunk's last rate is half the peak. [P: §3.1]
        "train.keep_steps": str(tuple(starts)),
        "train.steps": str(starts[-1]),
    }
    trunk = folder / "trunk"
    yield _run(size, trunk, file, keys)
    for start in starts:
        yield _run(size, folder / f"{_PREFIX}{start}", file, keys | {"train.cooldown_from": f"{trunk}:{start}"})


def _run(size: str, workdir: epath.Path, file: str, keys: Mapping[str, str]) -> Run:
    arguments = [f"--config={file}", f"--workdir={workdir}", *(f"--config.{key}={text}" for key, text in keys.items())]
    return Run(size, workdir, load_config(file, list(keys.items())), arguments)


def cooldown_folders(workdir: epath.PathLike) -> list[epath.Path]:
    """Returns the folders of all started cooldowns in the study's folder, in order."""
    folder = epath.Path(workdir)
    if not folder.is_dir():
        raise UserError("--workdir: no such folder", str(workdir), "Give the --workdir of experiments/scaling/grid.py")
    sizes = [path for path in folder.iterdir() if path.is_dir()]
    return sorted(path for size in sizes for path in size.iterdir() if path.name.startswith(_PREFIX))
