"""Fake runs of a scaling study: the files that grid and fit read, without training."""

from __future__ import annotations

import json

from aimv2_jax.checkpoint import manifest
from aimv2_jax.checkpoint.metadata import FORMAT_VERSION, manifest_header
from aimv2_jax.config.load import config_to_dict
from experiments.scaling.study import Run


def write_run(run: Run, step: int | None = None, **losses: float) -> None:
    """Writes a run's checkpoint of a step (default: the last) without arrays, and its metrics with the given losses."""
    step = run.steps if step is None else step
    meta = {"format_version": FORMAT_VERSION, "step": step, "config": config_to_dict(run.config), "eval_loss": None}
    meta |= {"extra": {}, "leaves": {}}
    folder = run.workdir / "checkpoints" / str(step)
    (folder / "meta").mkdir(parents=True)
    (folder / "meta/metadata").write_text(json.dumps(meta))
    manifest.write(folder, manifest_header(meta))
    lines = [{"step": step, "loss": 9.0}, *([{"step": step} | losses] if losses else [])]
    (run.workdir / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
