"""The grid of a scaling study: its runs, the unfinished ones, and how they are started in sequence."""

from __future__ import annotations

import dataclasses
import shlex
import signal
import subprocess
import time

import pytest

from aimv2_jax.errors import EXIT_FINISHED, EXIT_GUARD, EXIT_RETRY, UserError
from aimv2_jax.main import parse_arguments as trainer_arguments
from experiments.scaling import grid
from experiments.scaling.grid import Subprocess, main, missing, parse_arguments, start
from experiments.scaling.study import STUDIES, plan
from tests.helpers.study_runs import write_run

STUDY = dataclasses.replace(STUDIES["miniature"], sizes=("nano", "tiny"), samples=(1024, 4096))


def names(runs):
    return [run.name for run in runs]


def never() -> bool:
    return False


@pytest.fixture
def runs(tmp_path):
    return plan(STUDY, tmp_path)


def test_plan_when_a_study_then_a_trunk_a_size_and_a_cooldown_for_each_count(runs, tmp_path):
    assert names(runs) == [
        *("nano/trunk", "nano/cooldown_51", "nano/cooldown_205"),
        *("tiny/trunk", "tiny/cooldown_51", "tiny/cooldown_205"),
    ]
    trunk, first, last = runs[:3]
    assert (trunk.start, trunk.steps, first.start, first.steps, last.start, last.steps) == (0, 205, 51, 64, 205, 256)
    assert (first.samples, last.samples) == (1024, 4096)
    assert trunk.config.optimizer.schedule == "half_cosine" and trunk.config.optimizer.schedule_steps == 205
    assert trunk.config.train.keep_steps == (51, 205)
    assert last.config.cooldown.trunk == str(tmp_path / "nano/trunk")
    assert [run.config.model.encoder.width for run in runs] == [64] * 3 + [192] * 3
    assert runs[3].parameters == (2_782_272, 3_674_688)


def test_plan_arguments_parse_to_its_configs(runs):
    """The trainer reads the arguments of each planned run as the config and the workdir of the plan."""
    for run in runs:
        config, workdir, *_ = trainer_arguments(run.arguments)
        assert config == run.config and str(workdir) == str(run.workdir)


def test_plan_when_scaled_then_samples_by_it_and_batch_and_warm_up_by_its_root(tmp_path):
    [trunk, first, *_] = plan(dataclasses.replace(STUDY, scale=0.25), tmp_path)
    assert (trunk.config.data.batch_size, trunk.config.optimizer.warmup_steps) == (8, 10)
    assert first.samples == 256 and trunk.steps == round(1024 / 8 * 0.8)


def test_plan_when_the_papers_then_its_sizes_samples_and_batch(tmp_path):
    runs = plan(STUDIES["paper"], tmp_path)
    points = [run for run in runs if run.config.cooldown]
    assert {run.size for run in points} == {"large", "huge", "1b", "3b"} and len(runs) == 4 * (1 + 7)
    assert min(run.samples for run in points) == pytest.approx(5e8, rel=1e-4)
    assert max(run.samples for run in points) == pytest.approx(6.4e9, rel=1e-4)
    assert all(run.config.data.batch_size == 8192 and run.config.optimizer.warmup_steps == 12_500 for run in runs)
    assert {run.size: run.config.optimizer.peak_lr for run in runs}["3b"] == 4e-4
    for trunk in (run for run in runs if run.config.cooldown is None):
        assert trunk.samples == pytest.approx(5e9, rel=0.03)  # 5.12 billion, "5 billion" in the paper.
        assert trunk.config.optimizer.schedule == "half_cosine" and trunk.config.optimizer.end_lr == 0.0
    for run in points:
        assert run.steps - run.start == pytest.approx(0.2 * run.steps, abs=1)
        assert run.config.optimizer.cooldown_lr == 1e-6


@pytest.mark.parametrize(
    ("changes", "overrides", "words"),
    [
        ({"sizes": ("vast",)}, [], "--sizes: no such size: 'vast'"),
        ({"samples": (1024, 1025)}, [], "two are the same steps"),
        ({"samples": (64, 4096)}, [], "in the warm-up"),
        ({"scale": 0.0}, [], "--scale is out of range"),
        ({}, [("data.batch_size", "4")], "data.batch_size is set by the study.*--batch"),
        ({}, [("eval.sources", "{}")], "eval.sources is empty"),
    ],
)
def test_plan_when_it_cannot_work_then_one_sentence_before_anything_starts(tmp_path, changes, overrides, words):
    with pytest.raises(UserError, match=words):
        plan(dataclasses.replace(STUDY, **changes), tmp_path, overrides)


def test_missing_with_some_runs_finished(runs):
    """Unfinished runs are missing, trunks only if a cooldown waits for them."""
    assert names(missing(runs)) == names(runs)
    for run in runs[1:3]:  # All cooldowns of nano are finished, so its trunk is not needed.
        write_run(run)
    write_run(runs[3])
    write_run(runs[4], step=60)
    assert names(missing(runs)) == ["tiny/cooldown_51", "tiny/cooldown_205"]


def test_missing_when_the_folder_has_another_study_then_refused_by_the_key(runs, tmp_path):
    write_run(runs[1])
    other = plan(STUDY, tmp_path, [("seed", "5")])
    with pytest.raises(UserError, match="config seed may not change"):
        missing(other)


def test_start_trains_all_runs_in_order(runs):
    """A start without results trains all runs in order, and the next start trains nothing."""
    trained = []

    def trainer(run):
        trained.append(run.name)
        write_run(run)
        return EXIT_FINISHED

    assert start(runs, trainer, never) == EXIT_FINISHED
    assert trained == names(runs)
    assert start(runs, trainer, never) == EXIT_FINISHED
    assert trained == names(runs)


def test_start_repeats_trainer_after_code_75(runs):
    """A trainer that ends with code 75 is started again as long as it makes progress."""
    steps = iter([20, 100, None])
    trained = []

    def trainer(run):
        trained.append(run.name)
        step = next(steps) if run is runs[0] else None
        write_run(run, step)
        return EXIT_FINISHED if step is None else EXIT_RETRY

    assert start(runs, trainer, never) == EXIT_FINISHED
    assert trained == [names(runs)[0]] * 2 + names(runs)
    with pytest.raises(UserError, match=r"ended before its last step.*75"):
        start(plan(STUDY, runs[0].workdir.parents[1] / "new"), lambda run: EXIT_RETRY, never)


def test_start_when_a_trainer_fails_then_stops_naming_the_run(runs):
    with pytest.raises(UserError, match=r"run nano/trunk of the study ended.*exit code: 3"):
        start(runs, lambda run: EXIT_GUARD, never)


def test_start_when_asked_to_stop_then_no_further_run_and_75(runs):
    trained = []
    assert start(runs, lambda run: trained.append(run.name) or EXIT_RETRY, lambda: True) == EXIT_RETRY
    assert trained == ["nano/trunk"]


class StoppedAtOnce(subprocess.Popen):
    """A child process during whose start this process receives SIGTERM."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        time.sleep(0.2)  # Time for the child to install its handler.
        signal.raise_signal(signal.SIGTERM)


@pytest.mark.parametrize("when", ["while it runs", "while it starts"])
def test_trainer_when_this_process_gets_sigterm_then_it_is_handed_on(runs, monkeypatch, tmp_path, when):
    """A fake trainer may send SIGTERM to its parent; it exits with 75 when it receives the signal itself."""
    program, received = tmp_path / "trainer", tmp_path / "received"
    signal_parent = "sleep 0.3; kill -TERM $PPID" if when == "while it runs" else ""
    program.write_text(
        f"#!/bin/sh\ntrap 'echo > {received}; exit 75' TERM\n{signal_parent}\nfor i in $(seq 100); do sleep 0.1; done\n"
    )
    program.chmod(0o755)
    monkeypatch.setattr(grid.sys, "executable", str(program))
    if when == "while it starts":
        monkeypatch.setattr(grid.subprocess, "Popen", StoppedAtOnce)
    trainer, before = Subprocess(), signal.getsignal(signal.SIGTERM)
    with trainer.listening():
        assert start(runs, trainer, trainer.stopped) == EXIT_RETRY
    assert received.exists() and trainer(runs[0]) == EXIT_RETRY  # No further run is started.
    assert signal.getsignal(signal.SIGTERM) == before


def test_main_without_start_prints_commands(tmp_path, capsys, monkeypatch):
    """The runs are listed and their commands printed, and none is started, without --start."""
    monkeypatch.setattr(Subprocess, "__call__", lambda *args: pytest.fail("a run was started"))
    words = [f"--workdir={tmp_path / 's'}", "--sizes=nano", "--samples=1024,4.096e3", "--config.data.workers=0"]
    assert main(words) == EXIT_FINISHED
    *_, listed, first, second, third = capsys.readouterr().out.splitlines()
    assert "3 runs" in listed and not (tmp_path / "s").exists()
    config, workdir, *_ = trainer_arguments(shlex.split(third)[3:])
    assert config.cooldown.start == 205 and config.data.workers == 0 and workdir.name == "cooldown_205"
    assert all(line.startswith("python -m aimv2_jax.main --config=") for line in (first, second, third))


def test_arguments_when_given_then_they_change_the_study():
    study, workdir, starts, overrides = parse_arguments(
        ["--workdir=w", "--study=paper", "--scale=0.5", "--batch=64", "--sizes=large,large,huge", "--config.seed=3"]
    )
    assert (study.scale, study.batch, study.sizes) == (0.5, 64, ("large", "huge"))
    assert study.samples == STUDIES["paper"].samples and study.config == STUDIES["paper"].config
    assert (workdir, starts, overrides) == ("w", False, [("seed", "3")])


@pytest.mark.parametrize(
    "word", ["--samples=many", "--sizes=,", "--samples=0", "--batch=0", "--study=mine", "--scale=x"]
)
def test_arguments_when_wrong_then_exit_code_2_and_one_line(word, capsys):
    with pytest.raises(SystemExit) as ended:
        parse_arguments(["--workdir=w", word])
    assert ended.value.code == 2
    assert capsys.readouterr().err.count("\n") == 1
