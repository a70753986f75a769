"""Every GPU of a node is used once, for every launcher.

The launchers set these variables:

- srun: `SLURM_STEP_TASKS_PER_NODE` always, `SLURM_TASKS_PER_NODE` and `SLURM_NTASKS` unless `--preserve-env`
  (src/common/env.c, env_array_for_step), `SLURM_NTASKS_PER_NODE` where the option was given; it is the job's, and a
  step may have fewer. `SLURM_GPUS_ON_NODE` counts the step's GPUs on the node, also in a task that is bound to some of
  them; `CUDA_VISIBLE_DEVICES` lists those of the task, from 0 where cgroups constrain devices
  (src/plugins/gres/common/gres_common.c, gres_common_gpu_set_env). `--gpus-per-task` binds (srun(1)).
- mpirun of Open MPI: `OMPI_COMM_WORLD_LOCAL_RANK` and `_SIZE`, and nothing about GPUs.
- CUDA shows the listed devices before the first that does not exist (CUDA Programming Guide, CUDA_VISIBLE_DEVICES).
"""

from __future__ import annotations

import pytest

from aimv2_jax.distributed import local_devices as module
from aimv2_jax.distributed.local_devices import expand_counts, local_devices
from aimv2_jax.errors import UserError

EIGHT = "0,1,2,3,4,5,6,7"


def srun(
    tasks: str, local: int, gpus: int = 8, cuda: str | None = EIGHT, node: int = 0, **others: str
) -> dict[str, str]:
    """Variables of a task; variables of the job (`others`) may differ from the step's."""
    step = {
        "SLURM_STEP_TASKS_PER_NODE": tasks,
        "SLURM_TASKS_PER_NODE": tasks,
        "SLURM_NODEID": str(node),
        "SLURM_LOCALID": str(local),
        "SLURM_GPUS_ON_NODE": str(gpus),
    }
    return step | ({} if cuda is None else {"CUDA_VISIBLE_DEVICES": cuda}) | others


def mpirun(local: int, size: int, **others: str) -> dict[str, str]:
    return {"OMPI_COMM_WORLD_LOCAL_RANK": str(local), "OMPI_COMM_WORLD_LOCAL_SIZE": str(size)} | others


@pytest.fixture
def driver(tmp_path, monkeypatch):
    """The NVIDIA driver's folder of GPUs on a machine that has eight."""
    for number in range(8):
        (tmp_path / f"0000:{number:02x}:00.0").mkdir()
    monkeypatch.setattr(module, "_DRIVER", tmp_path)


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        (srun("1(x4)", 0), None),  # One task per node: launch/slurm.sbatch.
        (srun("1", 0, gpus=1, cuda="3"), None),
        (srun("8(x2)", 5), (5,)),  # One task per GPU; each task sees all GPUs.
        (srun("2(x3),1", 1), (4, 5, 6, 7)),
        (srun("2(x3),1", 0, node=3), None),  # The last node has one task.
        (srun("4", 2, gpus=4, cuda="4,5,6,7"), (2,)),  # Half of a node: indices count the visible GPUs.
        (srun("2", 1, gpus=4, cuda=None), (2, 3)),  # No devices listed (gres.conf: Flags=no_gpu_env).
        (srun("8", 5, cuda="5"), None),  # --gpus-per-task=1: each sees its own.
        (srun("8", 5, cuda="0"), None),  # The same where cgroups constrain devices.
        (srun("2", 1, cuda="4,5,6,7"), None),  # --gpus-per-task=4.
        (srun("2", 1, cuda="MIG-3e8f4c1a-6e0c-5a83-8f0e-1f6f0e6f3c11", gpus=2), None),
        # A step of one task per node in a job of eight: srun --ntasks-per-node=1.
        (srun("1(x4)", 0, SLURM_NTASKS_PER_NODE="8"), None),
        (srun("1(x4)", 0, SLURM_NTASKS_PER_NODE="8", SLURM_TASKS_PER_NODE="8(x4)"), None),  # With --preserve-env.
        (srun("2", 1, JAX_LOCAL_DEVICE_IDS="1,3"), None),  # jax reads it.
        (srun("3", 1, JAX_PLATFORMS="cpu"), None),
        (srun("8", 5, JAX_PLATFORMS="cuda,cpu"), (5,)),
        ({"SLURM_LOCALID": "1", "SLURM_NTASKS_PER_NODE": "2", "SLURM_GPUS_ON_NODE": "2"}, (1,)),
    ],
)
def test_gpus_of_a_slurm_task(variables, expected):
    assert local_devices("slurm", variables) == expected


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        (mpirun(0, 1), None),  # mpirun -N 1.
        (mpirun(3, 8), (3,)),
        (mpirun(1, 2), (4, 5, 6, 7)),
        (mpirun(1, 4, CUDA_VISIBLE_DEVICES="0,1,2,3"), (1,)),  # Set for all ranks.
        (mpirun(1, 8, CUDA_VISIBLE_DEVICES="1"), None),  # Set by a script that each rank runs.
        (mpirun(1, 2, CUDA_VISIBLE_DEVICES="4,5,6,7"), None),
        (mpirun(1, 2, CUDA_VISIBLE_DEVICES=EIGHT, SLURM_GPUS_ON_NODE="8"), (4, 5, 6, 7)),  # Inside a Slurm job.
        (mpirun(1, 2, CUDA_VISIBLE_DEVICES="-1"), None),  # None is visible: CPUs.
        (mpirun(1, 2, CUDA_VISIBLE_DEVICES=""), None),
    ],
)
def test_gpus_of_an_mpi_rank(variables, expected, driver):
    assert local_devices("ompi", variables) == expected


def test_gpus_when_the_machine_has_none(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "_DRIVER", tmp_path / "none")
    assert local_devices("ompi", mpirun(1, 2)) is None
    assert local_devices("gketpu", {}) is None


@pytest.mark.parametrize("tasks", [3, 16])
def test_gpus_when_they_do_not_divide(tasks):
    with pytest.raises(UserError, match=f"8 GPUs, {tasks} processes.*one process per node"):
        local_devices("slurm", srun(str(tasks), 0))


def test_gpus_of_all_tasks_of_a_node_are_disjoint():
    taken = [local_devices("slurm", srun("4(x2)", local, node=1)) for local in range(4)]
    assert sorted(device for devices in taken for device in devices) == list(range(8))


@pytest.mark.parametrize(("text", "counts"), [("1", [1]), ("2(x3),1", [2, 2, 2, 1]), ("1(x2),3(x2)", [1, 1, 3, 3])])
def test_tasks_per_node_in_short_form(text, counts):
    assert expand_counts(text) == counts


@pytest.mark.parametrize("text", ["", "2(x", "two", "2,,1"])
def test_tasks_per_node_when_garbled(text):
    with pytest.raises(ValueError, match="tasks per node"):
        expand_counts(text)
