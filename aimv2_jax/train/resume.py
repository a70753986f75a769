"""Config keys that may change when a run is resumed, with the reasons. Data and tokenizer: data_check.py."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterator, Mapping
from typing import Any

from aimv2_jax.config.load import config_to_dict, flatten
from aimv2_jax.config.schema import Config
from aimv2_jax.errors import UserError

# All other keys must stay the same, so that the resumed run equals, step by step, a run that was never stopped.
MAY_CHANGE = {
    "train.steps": "where the run ends; the learning rate follows optimizer.schedule_steps",
    "train.log_every": "how often metrics are logged",
    "train.eval_every": "how often the run is evaluated",
    "train.eval_at_start": "how often the run is evaluated",
    "train.save_every": "how often the run is saved",
    "train.keep": "which checkpoints are kept",
    "train.keep_steps": "which checkpoints are kept",
    "train.microbatches": "the same batch in other parts: rounding only, and fewer devices need more parts",
    "train.compilation_cache": "where compiled code is cached",
    "train.tensorboard": "where metrics go",
    "train.wandb_project": "where metrics go",
    "train.profile": "which steps are profiled",
    "processes.*": "how long processes wait for one another",
    "guard.*": "applies to later steps; earlier decisions are in the checkpoint",
    "watch.*": "when the run counts as hung",
    "mesh.*": "rounding only: examples, prefixes and the saved state are the same on any mesh",
    "model.layers": "the same parameter tree, executed in another way: rounding only",
    "model.remat": "what the backward pass recomputes: rounding only",
    "model.decoder.remat": "what the backward pass recomputes: rounding only",
    "lit.chunks": "the same loss in other parts: rounding only",
    "model.attention": "which kernel computes the same attention: rounding only",
    "train.tpu_compiler_options.*": "how the step is compiled: rounding only",
    "train.gpu_compiler_options.*": "how the step is compiled: rounding only",
    "data.workers": "which process reads a batch; its contents follow from the step",
    "data.read_threads": "when a record is read",
    "data.prefetch": "when a batch is read",
    "data.cache_dir": "where a host keeps what it has read",
    "data.cache_gb": "how much of what it has read a host keeps",
    "data.max_bad_fraction": "when the run aborts; changes no example",
    "data.sources.*": "a folder may move; names and records stay, since the order of examples depends on them",
    "tokenizer.path": "a file may move",
    "init.path": "a folder may move; it is read before the first step only",
    "distill.path": "a folder may move; checkpoints have the teacher",
    "eval.*": "evaluation changes no parameter; the best step is chosen among losses measured in the same way",
}
# Under these patterns keys may also be added or removed; under the others only values may change.
_MAY_COME_AND_GO = ("eval.*", "guard.*", "watch.*", "processes.*", "train.profile")
_MAY_COME_AND_GO += ("train.tpu_compiler_options.*", "train.gpu_compiler_options.*", "data.cache_dir", "data.cache_gb")

# Keys of a cooldown. A branch may differ from its trunk in these and in the keys above.
COOLDOWN = ("train.cooldown_from", "optimizer.cooldown_share", "optimizer.cooldown_lr")

_ABSENT = "absent"


def check_resumable(saved: Mapping[str, Any], current: Config) -> None:
    """Compares the config in a checkpoint's `meta` with this run's.

    Raises:
      UserError: for the first key that differs and may not change, with its old and new value.
    """
    for key, before, now in _differences(saved, current):
        owner = "a different model" if key.startswith("model.") else "a different run"
        raise UserError(
            f"the workdir is that of {owner}: config {key} may not change when a run is resumed",
            f"{before} before, {now} now",
            f"Set {key} back to {before}, or give another --workdir",
        )


def check_trunk(saved: Mapping[str, Any], current: Config) -> None:
    """Compares the config of the run in `train.cooldown_from` with this run's, except for the keys in `COOLDOWN`.

    Raises:
      UserError: for the first key that differs and may not change, or where that run is a cooldown itself.
    """
    trunk = current.train.cooldown_from
    if saved["train"].get("cooldown_from") is not None:
        remedy = "Branch off that run's own trunk"
        raise UserError("config train.cooldown_from is a step of a run that cools down itself", trunk, remedy)
    for key, before, now in _differences(saved, current):
        if key not in COOLDOWN:
            raise UserError(
                f"config train.cooldown_from={trunk} is a run with another {key}, which may not change in a branch",
                f"{before} there, {now} here",
                f"Set {key} to {before}, or branch off another run",
            )


def _differences(saved: Mapping[str, Any], current: Config) -> Iterator[tuple[str, Any, Any]]:
    """Yields the keys that differ and may not change, with both values."""
    old, new = flatten(saved), flatten(config_to_dict(current))
    for key in sorted(old.keys() | new.keys()):
        before, now = old.get(key, _ABSENT), new.get(key, _ABSENT)
        added_or_removed = _ABSENT in (before, now)
        if _comparable(key, before) != _comparable(key, now) and not _may_change(key, added_or_removed):
            yield key, before, now


def _comparable(key: str, value: Any) -> Any:
    """The value, or for a cooldown's trunk only its step, since the folder may move."""
    return value.rpartition(":")[2] if key == "train.cooldown_from" and value not in (None, _ABSENT) else value


def _may_change(key: str, added_or_removed: bool) -> bool:
    allowed = _MAY_COME_AND_GO if added_or_removed else MAY_CHANGE
    return any(fnmatch.fnmatchcase(key, pattern) for pattern in allowed)
