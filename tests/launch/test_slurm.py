"""The Slurm script, with a fake srun that starts real processes and a fake scontrol that records its arguments."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from aimv2_jax.checkpoint.checkpointer import CheckpointReader
from tests.helpers.bytes_tokenizer import SITE
from tests.helpers.launching import LAUNCH, environment, run, stand_in
from tests.helpers.tiny import ROOT, tiny_arguments

# Imitates srun(1) for a step with one task a node: it passes the environment on, sets SLURM_STEP_* and task numbers,
# forwards SIGTERM, rejects unknown options, and exits with the highest code of its tasks, 128 + N for one that signal N
# ended. With --kill-on-bad-exit=0 it ends no task because another failed.
SRUN = """
while [[ $1 == --* ]]; do
  case $1 in --kill-on-bad-exit=0 | --wait=*) ;; *) echo "srun: unrecognized option '$1'" >&2; exit 1 ;; esac
  echo "$1" >>"$RECORD/srun"
  shift
done
trap 'kill -TERM "${tasks[@]}" 2>/dev/null' TERM
export SLURM_STEP_NUM_TASKS=$SLURM_NTASKS SLURM_STEP_NUM_NODES=$SLURM_NTASKS
export SLURM_STEP_NODELIST="${NODES:-n[1-$SLURM_NTASKS]}"
export SLURM_STEP_TASKS_PER_NODE="1(x$SLURM_NTASKS)" SLURM_TASKS_PER_NODE="1(x$SLURM_NTASKS)" SLURM_LOCALID=0
for ((task = 0; task < SLURM_NTASKS; task++)); do SLURM_PROCID=$task SLURM_NODEID=$task "$@" & tasks+=($!); done
highest=0
for task in "${tasks[@]}"; do
  until wait "$task"; code=$?; ! kill -0 "$task" 2>/dev/null; do :; done
  # The trap may have interrupted that wait and the task may have ended since; wait again for its code.
  if ((code == 143)); then wait "$task"; code=$?; fi
  ((code > highest)) && highest=$code
done
exit "$highest"
"""
SCONTROL = 'echo "$@" >>"$RECORD/scontrol"\n'
TRAINER = """
trap 'exit 75' TERM
echo "$@" >>"$RECORD/process$SLURM_PROCID"
echo "$AIMV2_JAX_SECRET" >>"$RECORD/secrets"
[ "$CODE" = wait ] || exit "$CODE"
for ((i = 0; i < 600; i++)); do sleep 0.05; done
"""


@pytest.fixture
def job(tmp_path):
    """Environment of a job of two processes whose trainers exit with the given code."""
    programs = tmp_path / "programs"
    stand_in(programs, "srun", SRUN), stand_in(programs, "scontrol", SCONTROL)
    trainer = stand_in(programs, "trainer", TRAINER)

    def made(code: object) -> dict[str, str]:
        slurm = {"SLURM_SUBMIT_DIR": tmp_path, "SLURM_JOB_ID": 1234, "SLURM_NTASKS": 2}
        return environment(programs, PYTHON=trainer, RECORD=tmp_path, CODE=code, **slurm)

    return made


def record(folder: Path, name: str) -> list[str]:
    return (folder / name).read_text().splitlines() if (folder / name).exists() else []


@pytest.mark.parametrize(("code", "requeues"), [(0, []), (1, []), (2, []), (4, []), (75, ["requeue 1234"])])
def test_job_when_the_run_ends_then_code_75_puts_it_back_into_the_queue(code, requeues, job, tmp_path):
    done = run(["bash", LAUNCH / "slurm.sbatch", "--config=a.py", "--workdir=a b"], job(code), cwd="/")
    assert done.returncode == code, done.stderr
    assert record(tmp_path, "scontrol") == requeues
    for process in range(2):
        assert record(tmp_path, f"process{process}") == ["-m aimv2_jax.main --config=a.py --workdir=a b"]
    assert "--kill-on-bad-exit=0" in record(tmp_path, "srun")
    secrets = record(tmp_path, "secrets")
    assert len(secrets) == 2 and len(set(secrets)) == 1 and len(secrets[0]) == 32


def test_job_when_killed_then_requeued_five_times_in_a_row(job, tmp_path):
    codes = [137, 139, 75, *[137] * 6]
    for code in codes:
        assert run(["bash", LAUNCH / "slurm.sbatch"], job(code), cwd="/").returncode == code
    assert len(record(tmp_path, "scontrol")) == len(codes) - 1
    assert not list(tmp_path.glob(".aimv2-*"))


def test_job_when_slurm_sends_sigterm_then_it_waits_for_the_processes_and_goes_back_into_the_queue(job, tmp_path):
    command = ["bash", str(LAUNCH / "slurm.sbatch"), "--config=a.py"]
    with subprocess.Popen(command, env=job("wait"), start_new_session=True, stdout=subprocess.DEVNULL) as shell:
        deadline = time.monotonic() + 20
        while not all(record(tmp_path, f"process{process}") for process in range(2)):
            assert time.monotonic() < deadline
            time.sleep(0.02)
        # Like scancel --full (scancel(1)); sbatch --signal does not signal the shell.
        os.killpg(shell.pid, signal.SIGTERM)
        assert shell.wait(20) == 75
    assert record(tmp_path, "scontrol") == ["requeue 1234"]


def test_job_when_sbatch_reads_it_then_one_process_a_node_and_time_to_save():
    lines = (LAUNCH / "slurm.sbatch").read_text().splitlines()
    options = [line.removeprefix("#SBATCH ") for line in lines if line.startswith("#SBATCH")]
    assert {"--ntasks-per-node=1", "--requeue", "--open-mode=append", "--signal=TERM@600"} <= set(options)
    first_command = next(number for number, line in enumerate(lines) if line and not line.startswith("#"))
    assert all(number < first_command for number, line in enumerate(lines) if line.startswith("#SBATCH"))


def free_job_id() -> int:
    """A job whose coordinator port, which jax derives from its id, is free."""
    for job in range(4096):
        with contextlib.closing(socket.socket()) as listener, contextlib.suppress(OSError):
            listener.bind(("", 65535 - 4096 + 1 + job))
            return job
    raise AssertionError("no free port")


@pytest.mark.slow
@pytest.mark.xdist_group("processes")
@pytest.mark.parametrize("nodes", [1, 4])
def test_job_trains_on_nodes_of_several_devices(nodes, tmp_path):
    """README's command trains on one and four nodes, each with one process and two devices, fsdp within a node.

    The nodes are addresses of this machine and the devices CPUs; all else is as on a cluster: the script, Slurm's
    variables, jax's detection of the cluster, rendezvous, mesh and the training step.
    """
    programs = tmp_path / "programs"
    stand_in(programs, "srun", SRUN), stand_in(programs, "scontrol", SCONTROL)
    (tmp_path / "sitecustomize.py").write_text(SITE)
    addresses = "127.0.0.1" if nodes == 1 else f"127.0.0.[1-{nodes}]"
    slurm = {"SLURM_SUBMIT_DIR": ROOT, "SLURM_JOB_ID": free_job_id(), "SLURM_NTASKS": nodes, "NODES": addresses}
    variables = environment(
        programs,
        PYTHON=sys.executable,
        RECORD=tmp_path,
        JAX_PLATFORMS="cpu",
        XLA_FLAGS="--xla_force_host_platform_device_count=2",
        PYTHONPATH=f"{tmp_path}{os.pathsep}{ROOT}",
        **slurm,
    )
    workdir = tmp_path / "run"
    mesh = dict(mesh__data=-1, mesh__fsdp=2)
    arguments = tiny_arguments(workdir, train__steps=2, train__log_every=1, eval__sources={}, **mesh)
    done = run(["bash", LAUNCH / "slurm.sbatch", *arguments], variables)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"mesh slice 1 x data {nodes} x fsdp 2 x tensor 1; {nodes} process(es)" in done.stdout
    assert CheckpointReader(workdir).steps()[-1] == 2
    assert not record(tmp_path, "scontrol")
