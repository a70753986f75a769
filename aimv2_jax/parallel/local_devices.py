"""Which GPUs of its node a process takes, by the variables that Slurm and Open MPI set for it. Needs no jax.

jax would take one GPU a process there, the one numbered as the process is on its node (jax/_src/clusters/cluster.py),
and leave the others idle where a node has fewer processes than GPUs.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping
from pathlib import Path

from aimv2_jax.errors import UserError

_DRIVER = Path("/proc/driver/nvidia/gpus")  # The NVIDIA driver's folders, one a GPU of this machine or container.
_REPEATED = re.compile(r"(\d+)(?:\(x(\d+)\))?")


def local_devices(cluster: str, variables: Mapping[str, str]) -> tuple[int, ...] | None:
    """The GPUs that this process takes, counted among those that CUDA shows it; None: all of them.

    A process takes all that it sees, unless it shares them with the other processes of its node: then they are split in
    equal parts. `JAX_LOCAL_DEVICE_IDS`, which jax reads where this is None, overrules it.

    Args:
      cluster: as jax names it; "slurm", "ompi", or another, whose processes have their machine to themselves.
      variables: the environment.

    Raises:
      UserError: where shared GPUs cannot be split evenly.
      ValueError: for variables that are no numbers.
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
            "Start one process a node, which takes all of them, or as many as divide them; or set JAX_PLATFORMS=cpu",
        )
    share = visible // count
    return tuple(range(index * share, (index + 1) * share))


def _may_use_gpus(variables: Mapping[str, str]) -> bool:
    """Whether jax is left to take GPUs where it finds some."""
    platforms = variables.get("JAX_PLATFORMS", "")
    return not platforms or not {"cuda", "gpu"}.isdisjoint(platforms.split(","))


def _processes_on_node(cluster: str, variables: Mapping[str, str]) -> tuple[int, int]:
    """This process' number among those of its node, and how many they are."""
    if cluster == "ompi":
        return int(variables["OMPI_COMM_WORLD_LOCAL_RANK"]), int(variables["OMPI_COMM_WORLD_LOCAL_SIZE"])
    if cluster != "slurm":
        return 0, 1
    # srun sets SLURM_STEP_*; what it and the other variables leave as they were may be those of the whole job.
    counts = expand_counts(
        variables.get("SLURM_STEP_TASKS_PER_NODE")
        or variables.get("SLURM_TASKS_PER_NODE")
        or variables.get("SLURM_NTASKS_PER_NODE", "1")
    )
    node = int(variables.get("SLURM_NODEID", 0))
    return int(variables["SLURM_LOCALID"]), counts[node] if node < len(counts) else counts[-1]


def expand_counts(text: str) -> list[int]:
    """Slurm's short form of one number a node: `2(x3),1` is 2, 2, 2, 1."""
    counts: list[int] = []
    for part in text.split(","):
        found = _REPEATED.fullmatch(part)
        if found is None:
            raise ValueError(f"not a list of tasks per node: {text!r}")
        counts += [int(found[1])] * int(found[2] or 1)
    return counts


def _visible_gpus(variables: Mapping[str, str]) -> int:
    """GPUs that CUDA shows this process."""
    listed = variables.get("CUDA_VISIBLE_DEVICES")
    if listed is None:
        return _gpus_on_node(variables)
    # CUDA shows those before the first that does not exist, of which "-1" and "" are the usual ones.
    entries = (entry.strip() for entry in listed.split(","))
    return sum(1 for _ in itertools.takewhile(lambda entry: entry not in ("", "-1", "NoDevFiles"), entries))


def _gpus_on_node(variables: Mapping[str, str]) -> int:
    """GPUs of this node: those of the Slurm step, or all that the driver knows."""
    if "SLURM_GPUS_ON_NODE" in variables:
        return int(variables["SLURM_GPUS_ON_NODE"])
    return len(list(_DRIVER.iterdir())) if _DRIVER.is_dir() else 0


def _are_own(visible: int, count: int, variables: Mapping[str, str]) -> bool:
    """Whether the visible GPUs are this process' alone, rather than those of all `count` processes of the node."""
    if "CUDA_VISIBLE_DEVICES" not in variables:
        return False
    on_node = _gpus_on_node(variables)
    if "SLURM_GPUS_ON_NODE" in variables:
        # Slurm counts all GPUs of the step there, also where it binds each task to some of them (--gpus-per-task).
        return visible < on_node
    # Set by hand: a script gave each process its own, if there are too few for all, or just enough on the whole node.
    return visible < count or visible * count == on_node
