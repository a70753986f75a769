"""Which of a run's processes this one is: as flags say, or the cluster. Imports jax only to ask a cluster."""

from __future__ import annotations

import dataclasses
import ipaddress
import os
import socket
import warnings
from collections.abc import Mapping
from typing import Any

from aimv2_jax.config import ProcessesConfig
from aimv2_jax.errors import UserError
from aimv2_jax.parallel.local_devices import local_devices

# Of the step. SLURM_NTASKS, which jax reads, is the job's under `srun --preserve-env` (Slurm's src/common/env.c).
_STEP_TASKS = "SLURM_STEP_NUM_TASKS"


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
      local_devices: the GPUs of the host that are this process'; None: all that it sees.
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
        """What process 0 listens on: the coordinator's address where that is a number of this machine or `localhost`.

        All networks otherwise: the other hosts may know a name by another address than this one does, and the number
        may be that of a gateway.
        """
        host, port = self.address
        if host != "localhost" and not _is_of_this_machine(host):
            host = "::"
        return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _is_of_this_machine(host: str) -> bool:
    """Whether `host` is an address in numbers that can be listened on here."""
    try:
        family = socket.AF_INET if ipaddress.ip_address(host).version == 4 else socket.AF_INET6
        with socket.socket(family) as probe:
            probe.bind((host, 0))
        return True
    except (ValueError, OSError):
        return False


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
            cluster = _cluster(ClusterEnv)
            count = launch.count
            if count is None and cluster is not None and cluster.name == "slurm" and _STEP_TASKS in os.environ:
                count = int(os.environ[_STEP_TASKS])
            coordinator, count, index, _ = ClusterEnv.auto_detect_unset_distributed_params(
                launch.coordinator, count, launch.index, None, None, timeout_s
            )
            hosts = {} if cluster is None else _cluster_hosts(cluster, count)
            local = None if cluster is None else local_devices(cluster.name, os.environ)
    except UserError:
        raise
    except Exception as error:  # Whatever metadata servers, name services and variables of clusters come up with.
        said = next(iter(str(error).splitlines()), type(error).__name__)
        remedy = "Give --coordinator HOST:PORT --processes N --process I, or --processes 1 for this machine alone"
        raise UserError("the cluster does not say which process this is", said, remedy) from error
    known = {"--coordinator": coordinator, "--processes": count, "--process": index}
    missing = [flag for flag, value in known.items() if value is None]
    if not missing:
        return Place(coordinator, int(count), int(index), local if count > 1 else None, hosts)
    if launch == Launch():
        return None
    given = ", ".join(flag for flag in known if flag not in missing)
    raise UserError(f"{missing[0]} is missing", f"only {given} is known", f"Give {' and '.join(missing)}, too")


def _cluster(environments: Any) -> Any:
    """The one of jax's cluster environments that it finds itself in, or None."""
    known = environments._cluster_types
    return next((kind for kind in known if not kind.opt_in_only_method and kind.is_env_present()), None)


def _cluster_hosts(cluster: Any, count: int | None) -> dict[int, str]:
    """process -> host, where the cluster's own list has one for each."""
    if hasattr(cluster, "_get_worker_list_in_slice"):
        names = cluster._get_worker_list_in_slice()
        first = cluster._get_slice_id() * len(names)
        return {first + number: name for number, name in enumerate(names)}
    if cluster.name == "slurm":
        names = expand_nodes(os.environ["SLURM_STEP_NODELIST"])
        if len(names) == count:
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
