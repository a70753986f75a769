"""`python -m aimv2_jax.checkpoint.verify`: a line a step, no changes, and a reliable exit code."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from aimv2_jax.checkpoint import verify
from aimv2_jax.checkpoint.verify import main
from tests.helpers.checkpoints import folders, save_all, set_format


@pytest.fixture
def run(tmp_path):
    save_all(tmp_path / "run", {1: None, 2: None, 3: None})
    return tmp_path / "run"


def harm(run: Path) -> None:
    checkpoints = run / "checkpoints"
    (checkpoints / "2/more").write_text("")
    (checkpoints / "2/state/_METADATA").unlink()
    (checkpoints / "2/state/_sharding").write_text("{}")
    data = bytearray((checkpoints / "3/manifest.json").read_bytes())
    data[100] ^= 1
    (checkpoints / "3/manifest.json").write_bytes(data)


def state_of(folder: Path) -> dict:
    return {file: (file.stat().st_mtime_ns, file.is_file() and file.read_bytes()) for file in folder.rglob("*")}


def test_run_when_all_is_intact_then_a_line_a_step_and_0(run, capsys):
    assert main([str(run)]) == 0
    assert capsys.readouterr().out == "step 1: intact\nstep 2: intact\nstep 3: intact\n"


def test_run_when_steps_are_damaged_then_all_files_are_named_nothing_changes_and_2(run, tmp_path, capsys):
    harm(run)
    (run / "checkpoints/damaged-9-1").mkdir()
    before = state_of(run)
    assert main([str(run), "--json", str(tmp_path / "report.json")]) == 2
    output = capsys.readouterr()
    assert re.fullmatch(
        r"step 1: intact\nstep 2: damaged\n  more: extra\n  state/_METADATA: missing\n"
        r"  state/_sharding: size 2 instead of \d+\nstep 3: damaged\n  manifest.json: other contents\n"
        r"set aside before: damaged-9-1\n",
        output.out,
    )
    assert output.err.startswith("error: damaged checkpoints in ") and "'steps 2, 3'" in output.err
    assert state_of(run) == before
    report = json.loads((tmp_path / "report.json").read_text())
    assert [(step["step"], step["state"]) for step in report["steps"]] == [
        (1, "intact"),
        (2, "damaged"),
        (3, "damaged"),
    ]
    assert report["steps"][2]["wrong"] == [{"file": "manifest.json", "what": "other contents"}]
    assert report["set_aside"] == ["damaged-9-1"]


def test_step_when_named_then_only_that_is_read(run, capsys):
    harm(run)
    assert main([str(run), "--step", "1"]) == 0
    assert capsys.readouterr().out == "step 1: intact\n"
    assert main([str(run), "--step", "1", "3"]) == 2
    assert "'steps 3'" in capsys.readouterr().err


def test_step_of_another_format(run, capsys):
    set_format(run, 2, 1)
    assert main([str(run)]) == 2
    assert "has a format that this aimv2_jax does not read: 'format 1, needed is 5'" in capsys.readouterr().err


def test_step_when_its_trainer_deletes_it_meanwhile_then_left_out(run, capsys, monkeypatch):
    def vanish(self, step, progress):
        raise verify.StepVanished(self._folder, step)

    monkeypatch.setattr(verify.CheckpointReader, "verify", vanish)
    assert main([str(run)]) == 0
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["nowhere"], "the folder has no checkpoints: 'nowhere'"),
        (["RUN", "--step", "4"], "the run has no such step: 4. Existing steps: 1, 2, 3"),
        (["RUN", "--json", "nowhere/report.json"], "--json: no such folder"),
    ],
)
def test_arguments_when_wrong_then_one_line_and_2(run, capsys, arguments, message):
    assert main([str(run) if argument == "RUN" else argument for argument in arguments]) == 2
    stderr = capsys.readouterr().err
    assert message in stderr and stderr.count("\n") == 1


def test_command_when_started_then_it_works_and_its_progress_is_not_in_a_log(run):
    harm(run)
    command = [sys.executable, "-m", "aimv2_jax.checkpoint.verify", str(run)]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"JAX_PLATFORMS": "cpu"})
    assert (done.returncode, done.stderr.count("\n"), done.stdout.count("damaged")) == (2, 1, 2)
    assert folders(run) == ["1", "2", "3"]
