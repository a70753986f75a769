"""Training with several real processes: equal losses, portable checkpoints and a common exit code."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
import pytest

from aimv2_jax.checkpoint.checkpointer import Checkpointer, CheckpointReader
from aimv2_jax.errors import EXIT_FINISHED, EXIT_RETRY
from aimv2_jax.monitoring.events import read_events
from aimv2_jax.monitoring.metrics import read_metrics
from aimv2_jax.train import trainer
from aimv2_jax.train.builder import build_setup
from tests.helpers.bytes_tokenizer import BytesTokenizer
from tests.helpers.runs import assert_bitwise, saved_state
from tests.helpers.several import HOST, LocalProcesses, free_port, outputs_of_two
from tests.helpers.tiny import ROOT, TASKS, only_devices, tiny_arguments, tiny_config

# Tests with worker processes run one after another: in parallel they would slow down tests with timeouts.
pytestmark = pytest.mark.xdist_group("processes")
FOUR = pytest.param(4, marks=pytest.mark.slow)

HEARTBEAT_S = 10
STOPPED_S = 30  # Time from the signal until the step is saved; 10 would do if other tests did not share the cores.
SLOW_SAVES = """
import os, time

rename = os.rename
# The rename that turns a folder into a step takes one second.
os.rename = lambda old, new: (time.sleep(os.path.basename(new).isdecimal()), rename(old, new))[1]
"""
TINY = dict(
    eval__sources={},
    train__log_every=1,
    processes__heartbeat_timeout_s=HEARTBEAT_S,
)


def run_script(count: int, folder: Path, *arguments: str) -> None:
    """Runs `tests/helpers/checkpoint_process.py` on `count` processes."""
    port, running = str(free_port()), []
    try:
        for index in range(count):
            command = [
                sys.executable,
                str(ROOT / "tests/helpers/checkpoint_process.py"),
                str(index),
                str(count),
                port,
                *arguments,
            ]
            with (folder / f"script{index}.log").open("w") as log:
                running.append(subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=log))
        for index, one in enumerate(running):
            assert one.wait(240) == 0, (folder / f"script{index}.log").read_text()[-3000:]
    finally:
        for one in running:
            one.kill()
            one.wait()


@pytest.mark.parametrize(("writers", "readers"), [(2, 1), pytest.param(4, 2, marks=pytest.mark.slow)])
def test_checkpoint_when_saved_by_several_processes(tmp_path, writers, readers):
    """The checkpoint restores bitwise on fewer processes and on other meshes."""
    workdir, mesh = str(tmp_path / "run"), ["mesh__data=2", f"mesh__fsdp={writers}"]
    run_script(writers, tmp_path, "save", workdir, str(tmp_path / "saved.npz"), *mesh)
    with np.load(tmp_path / "saved.npz") as arrays:
        saved = [arrays[name] for name in sorted(arrays)]
    assert any(array.std() > 0 for array in saved)
    if readers > 1:
        run_script(readers, tmp_path, "restore", workdir, str(tmp_path / "two.npz"), "mesh__data=1", "mesh__fsdp=4")
        with np.load(tmp_path / "two.npz") as arrays:
            assert_bitwise([arrays[name] for name in sorted(arrays)], saved)
    for mesh in (dict(mesh__data=8), dict(mesh__data=1, mesh__fsdp=4, mesh__tensor=2)):
        assert_bitwise(saved_state(tmp_path / "run", 1, **mesh), saved)


MEETING = """
import sys, time
from aimv2_jax.config.schema import ProcessesConfig
from aimv2_jax.errors import UserError
from aimv2_jax.distributed import coordination as processes
from aimv2_jax.distributed.cluster import ProcessInfo

index = int(sys.argv[1])
processes.initialize(ProcessInfo(f"127.0.0.1:{sys.argv[2]}", 2, index), ProcessesConfig(60, 100, 60))
print(processes.hosts())
print(processes.broadcast("colour", ["red", "blue"][index], 60))
processes.barrier("lunch", 60)
for wait in (processes.barrier, lambda name, timeout_s: processes.broadcast(name, 1, timeout_s)):
    try:
        if index:
            wait(f"{wait is processes.barrier}", 1)
        else:
            time.sleep(3)
    except UserError as error:
        print(error)
processes.barrier("end", 60)
processes.shutdown()
"""


def test_processes_when_they_have_joined_then_know_all_hosts_agree_with_process_0_and_name_who_is_late():
    lines = outputs_of_two(MEETING)
    assert lines[0] == [str({0: HOST, 1: HOST}), "red"]
    late = f"of: 'process 0 on {HOST}'. Check their logs, or raise processes.barrier_timeout_s."
    assert lines[1] == [*lines[0], *(f"waited 1 s for the {name} {late}" for name in (True, False))]


@pytest.mark.slow
def test_stop_in_the_start_of_a_resumed_run(tmp_path):
    """SIGTERM to one of two processes that resume from step 3 and still compile: both save step 4 and exit with 75."""
    workdir = tmp_path / "run"
    config = tiny_config(**TINY)
    with Checkpointer(workdir, keep=1) as checkpointer:
        checkpointer.save(3, build_setup(config, jax.local_devices()[:1]).init(), config)
    arguments = tiny_arguments(workdir, train__steps=100_000, train__save_every=0, **TINY)
    with LocalProcesses(2, tmp_path / "out", arguments) as several:
        several.wait_for(lambda: "compiling the train step" in several.output(0)[0])
        several.kill(1, signal.SIGTERM)
        assert several.wait() == {0: EXIT_RETRY, 1: EXIT_RETRY}
        output = several.output(0)[0]
    assert "continuing from step 3" in output and "stopped on request: step 4 of 100000 is saved" in output
    assert CheckpointReader(workdir).steps() == [3, 4]


def trainer_of(supervisor: int) -> int:
    """Process id of the trainer that a supervisor has started."""
    [trainer] = Path(f"/proc/{supervisor}/task/{supervisor}/children").read_text().split()
    return int(trainer)


def running_in(workdir: Path) -> list[str]:
    """Process ids on this machine with that workdir."""
    found = []
    for file in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if f"--workdir={workdir}".encode() in file.read_bytes().split(b"\0"):
                found.append(file.parent.name)
        except OSError:  # The process has ended.
            continue
    return found


class Stopped(NamedTuple):
    """A run of several processes that was stopped and resumed."""

    count: int
    steps: int
    workdir: Path
    settings: dict[str, object]
    outputs: list[tuple[str, str]]  # Outputs of the processes after the resume.


@pytest.fixture(scope="module", params=[2, FOUR])
def stopped(request, tmp_path_factory) -> Stopped:
    """One process gets SIGTERM: all save the same step, exit with 75 in time, and compile nothing when restarted."""
    count, folder = request.param, tmp_path_factory.mktemp("stopped")
    workdir, cache = folder / "run", folder / "compiled"
    settings = TINY | dict(data__workers=1, train__compilation_cache=cache)
    cache.mkdir()
    for name in ("train_step", "init_state"):  # Reuse what is compiled so far; no other test writes to this folder.
        for file in Path(jax.config.jax_compilation_cache_dir).glob(f"jit_{name}-*"):
            shutil.copy(file, cache)
    arguments = tiny_arguments(workdir, train__steps=100_000, train__save_every=0, **settings)
    with LocalProcesses(count, folder / "out1", arguments, setup=SLOW_SAVES) as several:
        several.wait_for(lambda: "step       2/" in several.output(0)[0])
        asked_s = time.time()
        several.kill(1, signal.SIGTERM)
        several.wait_for(lambda: any((workdir / "checkpoints").glob("*-saving-????????")))
        # More signals during the save change nothing, also if its data workers get them.
        several.kill(1, signal.SIGTERM), several.kill(2 % count, signal.SIGTERM), several.kill(1, signal.SIGINT)
        os.killpg(trainer_of(several.processes[1].pid), signal.SIGTERM)
        assert several.wait(60) == dict.fromkeys(range(count), EXIT_RETRY)
        [ended] = [event for event in read_events(workdir) if event.kind == "stop"]
        assert ended.time_s - asked_s < STOPPED_S
        output, errors = several.output(0)
        stopped = int(re.search(r"stopped on request: step (\d+) of 100000 is saved", output)[1])
        # jax 0.12's own runtime also logs the signal.
        assert all("preemption_notifier" in line for line in errors.splitlines())
        assert all(several.output(index) == ("", "") for index in range(1, count))
    assert CheckpointReader(workdir).steps() == [stopped]
    steps, compiled = stopped + 3, set(cache.glob("*train_step*"))
    assert compiled
    settings["data__workers"] = 0
    with LocalProcesses(count, folder / "out2", tiny_arguments(workdir, train__steps=steps, **settings)) as several:
        several.finish()
        outputs = [several.output(index) for index in range(count)]
    assert set(cache.glob("*train_step*")) == compiled
    return Stopped(count, steps, workdir, settings, outputs)


class Killed(NamedTuple):
    """A run without interruption, until one of its processes was killed."""

    victim: int
    workdir: Path
    codes: dict[int, int]  # Exit codes of the other processes.
    ended_s: float  # Seconds from the kill until the last of them ended.
    errors: dict[int, str]  # Their stderr.


# Process 0 has jax's coordinator, without which jax on the other process also ends at once.
@pytest.fixture(scope="module", params=[0, pytest.param(1, marks=pytest.mark.slow)])
def killed(request, stopped, tmp_path_factory) -> Killed:
    """A run like the stopped one, killed after it has saved the step at which that one ended."""
    folder, victim, count = tmp_path_factory.mktemp("killed"), request.param, stopped.count
    changes = dict(train__steps=100_000, train__save_every=0, train__keep_steps=(stopped.steps,))
    arguments = tiny_arguments(folder / "run", **stopped.settings | changes)
    with LocalProcesses(count, folder / "out", arguments) as several:
        several.wait_for(lambda: CheckpointReader(folder / "run").steps() == [stopped.steps])
        killed_s = several.kill(victim)
        others = sorted(set(range(count)) - {victim})
        codes = {index: several.processes[index].wait(HEARTBEAT_S) for index in others}
        ended_s = time.monotonic() - killed_s
        deadline_s = time.monotonic() + HEARTBEAT_S
        while running_in(folder / "run"):
            assert time.monotonic() < deadline_s, "a trainer has outlived its supervisor"
            time.sleep(0.1)
        return Killed(victim, folder / "run", codes, ended_s, {index: several.output(index)[1] for index in others})


def test_others_end_when_a_process_is_killed(killed):
    """They end in time, with the code for a retry, and name the process and its host."""
    assert set(killed.codes.values()) == {EXIT_RETRY} and killed.ended_s < HEARTBEAT_S
    for index, error in killed.errors.items():
        assert f"process {killed.victim} on {HOST} is missing" in error
        assert error.count("\n") == 1, error
        assert error in (killed.workdir / "logs" / f"process_{index:05d}.log").read_text()


def losses(workdir: Path) -> list[tuple[int, float]]:
    return [(line["step"], line["loss"]) for line in read_metrics(workdir)[0]]


def test_run_when_stopped_goes_on_exactly(stopped, killed):
    """The state and all losses equal those of the run without interruption."""
    assert_bitwise(saved_state(stopped.workdir, stopped.steps), saved_state(killed.workdir, stopped.steps))
    assert losses(stopped.workdir) == losses(killed.workdir)[: stopped.steps]
    assert [step for step, _ in losses(stopped.workdir)] == list(range(1, stopped.steps + 1))


def test_losses_when_several_processes_train(stopped, tmp_path):
    """The losses equal those of one process with as many devices."""
    config = tiny_config(train__steps=stopped.steps, train__save_every=0, **TINY)
    with only_devices(stopped.count):
        assert trainer.train(config, tmp_path, BytesTokenizer("", config.model.decoder.text_length)) == EXIT_FINISHED
    ours, theirs = (read_metrics(path)[0] for path in (stopped.workdir, tmp_path))
    assert [line["count_image"] for line in ours] == [line["count_image"] for line in theirs]
    # float32 over several devices: sums are computed in another order.
    np.testing.assert_allclose([line["loss"] for line in ours], [line["loss"] for line in theirs], rtol=2e-6)


@pytest.mark.parametrize("count", [2, FOUR])
def test_contrastive_loss_of_several_processes(count, tmp_path):
    """LiT's losses, over all pairs of the global batch, equal those of one device."""
    settings = TINY | TASKS["lit"] | dict(data__workers=0, train__steps=3, train__save_every=0)
    with LocalProcesses(count, tmp_path / "out", tiny_arguments(tmp_path / "several", **settings)) as several:
        several.finish()
    config = tiny_config(**settings)
    with only_devices(1):
        tokenizer = BytesTokenizer("", config.text.text_length, always_end=True)
        assert trainer.train(config, tmp_path / "one", tokenizer) == EXIT_FINISHED
    ours, theirs = (dict(losses(tmp_path / name)) for name in ("several", "one"))
    assert ours.keys() == theirs.keys() == {1, 2, 3}
    np.testing.assert_allclose(list(ours.values()), list(theirs.values()), rtol=1e-6)


def test_output_when_several_processes_train(stopped):
    """Only process 0 writes to the terminal; all processes have a log."""
    last, count = f"finished: step {stopped.steps}", stopped.count
    assert f"{count} process(es)" in stopped.outputs[0][0] and last in stopped.outputs[0][0]
    assert not any(out for out, _ in stopped.outputs[1:])
    logs = [(stopped.workdir / "logs" / f"process_{index:05d}.log").read_text() for index in range(count)]
    assert last in logs[0]
    assert all(f"process {index} of {count} on {HOST}" in log for index, log in enumerate(logs))
