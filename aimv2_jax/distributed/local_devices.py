"""Assignment of a node's GPUs to its processes, from the variables of Slurm and Open MPI. Needs no jax.

jax would take one GPU per process there, the one with the process' local rank (jax/_src/clusters/cluster.py), and leave
the others idle on a node with fewer processes than GPUs.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping
from pathlib import Path

from aimv2_jax.errors import UserError

_DRIVER = Path("/proc/driver/nvidia/gpus")  # The NVIDIA driver's folder, with one entry per GPU.
_REPEATED = re.compile(r"(\d+)(?:\(x(\d+)\))?")


def local_devices(cluster: str, variables: Mapping[str, str]) -> tuple[int, ...] | None:
    """Indices of this process' GPUs among those that CUDA shows it; None for all of them.

    A process takes all visible GPUs, unless it shares them with the other processes of its node: then they are split in
    equal parts. `JAX_LOCAL_DEVICE_IDS`, which jax reads if this is None, takes precedence.

    Args:
      cluster: jax's name of the cluster: "slurm", "ompi", or another, which runs one process per machine.
      variables: the environment.

    Raises:
      UserError: if shared GPUs cannot be split evenly.
      ValueError: for variables that are not numbers.
    """
    index, count = _processes_on_node(cluster, variables)
    if count == 1 or "JAX_LOCAL_DEVICE_IDS" in variables or not _may_use_gpus(variables):
        return None
    visible = _visible_gpus(variables)
    if not visible or _are_own(visible, count, variables):
        return None
    if visible % count:
        raise UserError(
            "the GPUs of this node cannot be split evenly over its processes",
            f"{visible} GPUs, {count} processes",
            "Start one process per node, which takes all GPUs, or a number that divides them; or set JAX_PLATFORMS=cpu",
        )
    share = visible // count
    return tuple(range(index * share, (index + 1) * share))


def _may_use_gpus(variables: Mapping[str, str]) -> bool:
    """Whether JAX_PLATFORMS lets jax use GPUs."""
    platforms = variables.get("JAX_PLATFORMS", "")
    return not platforms or not {"cuda", "gpu"}.isdisjoint(platforms.split(","))


def _processes_on_node(cluster: str, variables: Mapping[str, str]) -> tuple[int, int]:
    """(this process' local rank, number of processes on its node)."""
    if cluster == "ompi":
        return int(variables["OMPI_COMM_WORLD_LOCAL_RANK"]), int(variables["OMPI_COMM_WORLD_LOCAL_SIZE"])
    if cluster != "slurm":
        return 0, 1
    # srun sets SLURM_STEP_*; variables that it leaves unchanged may describe the whole job.
    counts = expand_counts(
        variables.get("SLURM_STEP_TASKS_PER_NODE")
        or variables.get("SLURM_TASKS_PER_NODE")
        or variables.get("SLURM_NTASKS_PER_NODE", "1")
    )
    node = int(variables.get("SLURM_NODEID", 0))
    return int(variables["SLURM_LOCALID"]), counts[node] if node < len(counts) else counts[-1]


def expand_counts(text: str) -> list[int]:
    """Expands Slurm's short form of one number per node: `2(x3),1` becomes 2, 2, 2, 1."""
    counts: list[int] = []
    for part in text.split(","):
        match = _REPEATED.fullmatch(part)
        if match is None:
            raise ValueError(f"not a list of tasks per node: {text!r}")
        counts += [int(match[1])] * int(match[2] or 1)
    return counts


def _visible_gpus(variables: Mapping[str, str]) -> int:
    """Number of GPUs that CUDA shows this process."""
    listed = variables.get("CUDA_VISIBLE_DEVICES")
    if listed is None:
        return _gpus_on_node(variables)
    # CUDA shows the devices before the first one that does not exist; "-1" and "" are the usual ways to write such one.
    entries = (entry.strip() for entry in listed.split(","))
    return sum(1 for _ in itertools.takewhile(lambda entry: entry not in ("", "-1", "NoDevFiles"), entries))


def _gpus_on_node(variables: Mapping[str, str]) -> int:
    """Number of GPUs of this node: of the Slurm step, or all that the driver lists."""
    if "SLURM_GPUS_ON_NODE" in variables:
        return int(variables["SLURM_GPUS_ON_NODE"])
    return len(list(_DRIVER.iterdir())) if _DRIVER.is_dir() else 0


def _are_own(visible: int, count: int, variables: Mapping[str, str]) -> bool:
    """Whether the visible GPUs belong to this process alone, not to all `count` processes of the node."""
    if "CUDA_VISIBLE_DEVICES" not in variables:
        return False
    on_node = _gpus_on_node(variables)
    if "SLURM_GPUS_ON_NODE" in variables:
        # Slurm counts all GPUs of the step, even if it binds each task to some of them (--gpus-per-task).
        return visible < on_node
    # The user set CUDA_VISIBLE_DEVICES. Each process has its own GPUs if there are too few visible ones for all
    # processes, or if the visible ones of all processes add up to the node's.
    return visible < count or visible * count == on_node
