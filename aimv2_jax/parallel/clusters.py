"""Which of a run's processes this one is: as flags say, or the cluster. Imports jax only to ask a cluster."""

from __future__ import annotations

import dataclasses
import os
import warnings
from collections.abc import Mapping
from typing import Any

from aimv2_jax.config import ProcessesConfig
from aimv2_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Launch:
    """What the command line says of the processes (`--coordinator`, `--processes`, `--process`); None: nothing."""

    coordinator: str | None = None
    count: int | None = None
    index: int | None = None


@dataclasses.dataclass(frozen=True)
class Place:
    """One process among several.

    Args:
      coordinator: host:port of process 0: its watcher calls the roll there, then its trainer runs jax's coordinator.
      count: processes of the run.
      index: this one's number, from 0.
      local_devices: the accelerators of the host that are this process'; None: all.
      hosts: what the cluster says where processes run, as far as it does: those that never come can then be named.
    """

    coordinator: str
    count: int
    index: int
    local_devices: tuple[int, ...] | None = None
    hosts: Mapping[int, str] = dataclasses.field(default_factory=dict)

    @property
    def address(self) -> tuple[str, int]:
        host, _, port = self.coordinator.rpartition(":")
        return host.strip("[]"), int(port)

    @property
    def bind_address(self) -> str:
        """What process 0 listens on: this machine alone where the coordinator's name means that, else all networks."""
        host, port = self.address
        return f"{host}:{port}" if host in ("localhost", "127.0.0.1") else f"[::]:{port}"


def find_place(launch: Launch, settings: ProcessesConfig) -> Place | None:
    """This process' place; None for a run of one process.

    What the command line leaves out, the cluster says: a TPU's metadata, GKE, Slurm, Open MPI or Kubernetes, as jax
    reads them. `--processes 1` is one process on any cluster.

    Raises:
      UserError: for flags that don't fit together, and a cluster that cannot be read.
    """
    if launch.count == 1:
        return None
    _check(launch)
    if None in (launch.coordinator, launch.count, launch.index):
        place = _ask_cluster(launch, settings.startup_timeout_s)
    else:
        place = Place(launch.coordinator, launch.count, launch.index)
    if place is None or place.count == 1:
        return None
    _check(Launch(place.coordinator, place.count, place.index))
    return place


def _check(launch: Launch) -> None:
    if launch.coordinator is not None:
        host, _, port = launch.coordinator.rpartition(":")
        if not host or not port.isdecimal() or not 0 < int(port) < 65536:
            remedy = "Give the host and a free port of process 0, such as host-a:8476"
            raise UserError("--coordinator is not HOST:PORT", launch.coordinator, remedy)
    if launch.count is not None and launch.index is not None and launch.index >= launch.count:
        raise UserError(
            f"--process is not below --processes {launch.count}", launch.index, f"Count from 0 to {launch.count - 1}"
        )


def _ask_cluster(launch: Launch, timeout_s: int) -> Place | None:
    from jax._src.clusters import ClusterEnv  # What jax.distributed.initialize asks; jax has no public name for it.

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Of jax, in any pod without the package kubernetes: it may be alone there.
            coordinator, count, index, local = ClusterEnv.auto_detect_unset_distributed_params(
                launch.coordinator, launch.count, launch.index, None, None, timeout_s
            )
            hosts = _cluster_hosts(ClusterEnv)
    except Exception as error:  # Whatever metadata servers, name services and variables of clusters come up with.
        said = next(iter(str(error).splitlines()), type(error).__name__)
        remedy = "Give --coordinator HOST:PORT --processes N --process I, or --processes 1 for this machine alone"
        raise UserError("the cluster does not say which process this is", said, remedy) from error
    known = {"--coordinator": coordinator, "--processes": count, "--process": index}
    missing = [flag for flag, value in known.items() if value is None]
    if not missing:
        return Place(coordinator, int(count), int(index), None if local is None else tuple(local), hosts)
    if launch == Launch():
        return None
    given = ", ".join(flag for flag in known if flag not in missing)
    raise UserError(f"{missing[0]} is missing", f"only {given} is known", f"Give {' and '.join(missing)}, too")


def _cluster_hosts(cluster: Any) -> dict[int, str]:
    """process -> host, where the cluster's own list has one for each."""
    found = next(
        (kind for kind in cluster._cluster_types if not kind.opt_in_only_method and kind.is_env_present()), None
    )
    if hasattr(found, "_get_worker_list_in_slice"):
        names = found._get_worker_list_in_slice()
        first = found._get_slice_id() * len(names)
        return {first + number: name for number, name in enumerate(names)}
    if found is not None and found.name == "slurm":
        names = expand_nodes(os.environ.get("SLURM_STEP_NODELIST", ""))
        if len(names) == int(os.environ.get("SLURM_NTASKS", 0)):
            return dict(enumerate(names))
    return {}


def expand_nodes(text: str) -> list[str]:
    """The hosts of Slurm's short form: `a[1-2,07],b` is a1, a2, a07, b."""
    names, depth, word = [], 0, ""
    for letter in text + ",":
        depth += {"[": 1, "]": -1}.get(letter, 0)
        if letter == "," and not depth:
            names += _expand(word)
            word = ""
        else:
            word += letter
    return names


def _expand(word: str) -> list[str]:
    head, bracket, rest = word.partition("[")
    if not bracket:
        return [word] if word else []
    inside, _, tail = rest.partition("]")
    numbers = []
    for part in inside.split(","):
        low, _, high = part.partition("-")
        numbers += [str(number).zfill(len(low)) for number in range(int(low), int(high or low) + 1)]
    return [head + number + name for number in numbers for name in (_expand(tail) or [""])]
