"""Runs of a scaling study that nobody trained: what they would have left, as far as grid and fit look at it."""

from __future__ import annotations

import json

from aimv2_jax.config import config_to_dict
from experiments.scaling.study import Run


def leave(run: Run, step: int | None = None, **losses: float) -> None:
    """The checkpoint of a step (the last), without its arrays; and a line of metrics with the losses, if there are."""
    step = run.steps if step is None else step
    meta = {"format_version": 1, "step": step, "config": config_to_dict(run.config), "eval_loss": None}
    folder = run.workdir / "checkpoints" / str(step) / "meta"
    folder.mkdir(parents=True)
    (folder / "metadata").write_text(json.dumps(meta | {"extra": {}, "leaves": {}}))
    lines = [{"step": step, "loss": 9.0}, *([{"step": step} | losses] if losses else [])]
    (run.workdir / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
