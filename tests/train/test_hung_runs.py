"""Runs that hang: a trainer in a process of its own, since the watchdog ends it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from tiny import ROOT

from aimv2_jax.errors import EXIT_AGAIN, EXIT_HUNG
from aimv2_jax.train.events import read_events

# It watches the clock: not beside tests that keep both cores busy.
pytestmark = [pytest.mark.xdist_group("shared-memory"), pytest.mark.slow]

TRAINER = """
import sys, time
sys.path[:0] = [{root!r}, {tests!r}]
from pathlib import Path
from bytes_tokenizer import BytesTokenizer
from tiny import tiny_config
from aimv2_jax.train import loop
from aimv2_jax.train.checkpoint import Checkpointer
from aimv2_jax.train.program import Program

def late(call, at):
    turns = iter(range(1, 1000))
    return lambda *args, **kwargs: (time.sleep(600) if next(turns) == at else None, call(*args, **kwargs))[1]

compile_step = Program.compile_step
if {where!r} == "step":
    Program.compile_step = lambda *args: late(compile_step(*args), 7)
if {where!r} == "save":
    Checkpointer.save = late(Checkpointer.save, 2)
config = tiny_config(
    model__layers="scan", model__encoder__depth=1, model__decoder__depth=1, eval__sources={{}}, train__save_every=3,
    train__log_every=1, train__tensorboard=False, watch__step_s=5, watch__save_s=5,
)
loop.train(config, Path({workdir!r}), BytesTokenizer("", config.model.decoder.text_length))
"""


def run(workdir: Path, where: str) -> subprocess.CompletedProcess:
    code = TRAINER.format(root=str(ROOT), tests=str(ROOT / "tests"), where=where, workdir=str(workdir))
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    return subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300
    )


@pytest.mark.parametrize(("where", "step"), [("step", 7), ("save", 6)])
def test_run_when_it_hangs_then_ends_with_all_stacks_in_its_log_and_with_4_the_second_time(tmp_path, where, step):
    done = run(tmp_path, where)
    assert done.returncode == EXIT_AGAIN, done.stderr
    assert f"hung: process 0 on {os.uname().nodename} waits for {where} at step {step} since 5 s" in done.stderr
    assert ("in _steps" in done.stderr and "in late" in done.stderr) or "in <lambda>" in done.stderr
    [file] = (tmp_path / "hangs").iterdir()
    assert f"waits for {where} at step {step}" in file.read_text() and "thread" in file.read_text()
    [hang] = [event for event in read_events(tmp_path) if event.kind == "hang"]
    assert (hang.values["what"], hang.step) == (where, step)
    if where == "save":  # The restarted run is at another step when its second save comes: it hangs there once, too.
        return
    # A restart goes on from step 6: the seventh step that it computes is another. Make it the same one.
    (tmp_path / "again").mkdir()
    (tmp_path / "again/hangs").mkdir()
    file.rename(tmp_path / "again/hangs" / file.name)
    again = run(tmp_path / "again", where)
    assert again.returncode == EXIT_HUNG, again.stderr
    assert "as it did before" in again.stderr
