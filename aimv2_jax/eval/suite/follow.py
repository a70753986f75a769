"""Follows a run: calls a function for each of its checkpoints as it appears, until the last step."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path

from aimv2_jax.checkpoint.checkpointer import CheckpointReader
from aimv2_jax.checkpoint.metadata import DamagedStep, StepVanished
from aimv2_jax.console import print_line
from aimv2_jax.errors import UserError


def new_steps(
    workdir: str | Path,
    poll_s: float,
    log: Callable[[str], None] = print_line,
    sleep: Callable[[float], None] = time.sleep,
) -> Iterator[int]:
    """Yields the steps of a run in ascending order, each once, as they appear; ends after the run's last step.

    Raises:
      UserError: if the folder is no run's.
    """
    if not Path(workdir).is_dir() and "://" not in str(workdir):
        raise UserError("--follow: no such folder", str(workdir), "Give --checkpoint the --workdir of a run")
    seen: set[int] = set()
    waiting = False
    while True:
        steps = [step for step in CheckpointReader(workdir).steps() if step not in seen]
        if steps:
            waiting = False
            seen.add(steps[0])
            yield steps[0]
            if is_last(workdir, steps[0]):
                return
        else:
            if not waiting:
                log(f"waiting for the next checkpoint of {workdir}")
                waiting = True
            sleep(poll_s)


def is_last(workdir: str | Path, step: int) -> bool:
    """Whether the run ends with this step; False for a step that was deleted meanwhile, or is damaged."""
    try:
        config = CheckpointReader(workdir).meta(step)["config"]
    except (StepVanished, DamagedStep):
        return False
    return config is None or step >= config["train"]["steps"]
