"""Which config keys may change when a run is continued, and why. Data and tokenizer: data_check.py."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterator, Mapping
from typing import Any

from aimv2_jax.config import Config, config_to_dict, flatten
from aimv2_jax.errors import UserError

# Everything that isn't here must stay: the continued run is then, step by step, the one that was never stopped.
MAY_CHANGE = {
    "train.steps": "where the run ends; the learning rate follows optimizer.schedule_steps",
    "train.log_every": "how often it is looked at",
    "train.eval_every": "how often it is looked at",
    "train.eval_at_start": "how often it is looked at",
    "train.save_every": "how often it is saved",
    "train.keep": "which checkpoints stay on the disk",
    "train.keep_steps": "which checkpoints stay on the disk",
    "train.microbatches": "parts of one and the same batch: rounding only, and fewer devices need more parts",
    "train.compilation_cache": "where compiled code is kept",
    "train.tensorboard": "where metrics go",
    "train.wandb_project": "where metrics go",
    "train.profile": "how it is looked at",
    "processes.*": "how long they wait for one another",
    "guard.*": "what is done from now on; what was decided before is in the checkpoint",
    "watch.*": "when it counts as hung",
    "mesh.*": "rounding only: examples, prefixes and the saved state are the same on any mesh",
    "model.layers": "one parameter tree, run in two ways: rounding only",
    "model.remat": "what is computed again in the backward pass: rounding only",
    "model.decoder.remat": "what is computed again in the backward pass: rounding only",
    "model.attention": "who computes one and the same attention: rounding only",
    "train.tpu_compiler_options.*": "how the step is compiled: rounding only",
    "data.workers": "who reads a batch; what is in it follows from the step",
    "data.read_threads": "when a record is read",
    "data.prefetch": "when a batch is read",
    "data.max_bad_fraction": "when the run gives up; changes no example",
    "data.sources.*": "a folder may move; names and records stay, since the order of examples depends on them",
    "tokenizer.path": "a file may move",
    "init.path": "a folder may move; it is read before the first step only",
    "eval.*": "evaluation changes no parameter; the best is chosen among losses measured in the same way",
}
# Below these a key may also come and go; of the others only the value may change.
_NAMES_MAY_CHANGE = ("eval.*", "guard.*", "watch.*", "processes.*", "train.profile", "train.tpu_compiler_options.*")

# What makes a run a cooldown of another; in these alone, beside the above, it may differ from it.
COOLDOWN = ("train.cooldown_from", "optimizer.cooldown_share", "optimizer.cooldown_lr")

_ABSENT = "absent"


def check_resumable(saved: Mapping[str, Any], current: Config) -> None:
    """Compares the config that a checkpoint's `meta` holds with this run's.

    Raises:
      UserError: for the first key that differs and may not, with its old and new value.
    """
    for key, before, now in _differences(saved, current):
        whose = "a different model" if key.startswith("model.") else "a different run"
        raise UserError(
            f"the workdir is that of {whose}: config {key} may not change when a run is continued",
            f"{before} before, {now} now",
            f"Set {key} back to {before}, or give another --workdir",
        )


def check_trunk(saved: Mapping[str, Any], current: Config) -> None:
    """Compares the config of the run that `train.cooldown_from` names with this run's, the cooldown's keys apart.

    Raises:
      UserError: for the first key that differs and may not; or where that run is a cooldown itself.
    """
    trunk = current.train.cooldown_from
    if saved["train"].get("cooldown_from") is not None:
        remedy = "Branch off the run that it branches off"
        raise UserError("config train.cooldown_from is the step of a run that cools down itself", trunk, remedy)
    for key, before, now in _differences(saved, current):
        if key not in COOLDOWN:
            raise UserError(
                f"config train.cooldown_from={trunk} is a run with another {key}, which may not change in a branch",
                f"{before} there, {now} here",
                f"Set {key} to {before}, or branch off another run",
            )


def _differences(saved: Mapping[str, Any], current: Config) -> Iterator[tuple[str, Any, Any]]:
    """Keys that differ and may not, with both values."""
    old, new = flatten(saved), flatten(config_to_dict(current))
    for key in sorted(old.keys() | new.keys()):
        before, now = old.get(key, _ABSENT), new.get(key, _ABSENT)
        if _of_trunk(key, before) != _of_trunk(key, now) and not _may_change(key, renamed=_ABSENT in (before, now)):
            yield key, before, now


def _of_trunk(key: str, value: Any) -> Any:
    """What counts of a value: all of it; of a cooldown's trunk the step, since a folder may move."""
    return value.rpartition(":")[2] if key == "train.cooldown_from" and value not in (None, _ABSENT) else value


def _may_change(key: str, renamed: bool) -> bool:
    allowed = _NAMES_MAY_CHANGE if renamed else MAY_CHANGE
    return any(fnmatch.fnmatchcase(key, pattern) for pattern in allowed)
