"""Process index, count and coordinator of this process, from flags or the cluster. Imports jax only for clusters."""

from __future__ import annotations

import dataclasses
import ipaddress
import os
import socket
import warnings
from collections.abc import Mapping
from typing import Any

from aimv2_jax.config.schema import ProcessesConfig
from aimv2_jax.distributed.local_devices import local_devices
from aimv2_jax.errors import UserError, first_line

# Tasks of the step. SLURM_NTASKS, which jax reads, counts those of the job under `srun --preserve-env` (Slurm's
# src/common/env.c).
_STEP_TASKS = "SLURM_STEP_NUM_TASKS"


@dataclasses.dataclass(frozen=True)
class LaunchFlags:
    """Values of `--coordinator`, `--processes` and `--process`; None for a flag that is not given."""

    coordinator: str | None = None
    count: int | None = None
    index: int | None = None


@dataclasses.dataclass(frozen=True)
class ProcessInfo:
    """One process among several.

    Args:
      coordinator: host:port of process 0, where its supervisor holds the rendezvous and its trainer then runs jax's
        coordinator.
      count: number of processes in the run.
      index: index of this process, from 0.
      local_devices: the GPUs that this process uses; None for all that it sees.
      hosts: process index -> host, as far as the cluster knows; used to name processes that never join.
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
        """Address that process 0 listens on: the coordinator's if it is `localhost` or an IP address of this machine.

        Otherwise all interfaces: the other hosts may resolve a name to another address than this host does, and an IP
        address may be that of a gateway.
        """
        host, port = self.address
        if host != "localhost" and not _is_local_address(host):
            host = "::"
        return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _is_local_address(host: str) -> bool:
    """Whether `host` is an IP address that this machine can listen on."""
    try:
        family = socket.AF_INET if ipaddress.ip_address(host).version == 4 else socket.AF_INET6
        with socket.socket(family) as probe:
            probe.bind((host, 0))
        return True
    except (ValueError, OSError):
        return False


def find_process(flags: LaunchFlags, settings: ProcessesConfig) -> ProcessInfo | None:
    """Finds this process' index, count and coordinator; None for a run of one process.

    Values that the command line leaves out come from the cluster as jax detects it: a TPU's metadata, GKE, Slurm, Open
    MPI or Kubernetes. `--processes 1` means one process on any cluster.

    Raises:
      UserError: for inconsistent flags, or a cluster that cannot be read.
    """
    if flags.count == 1:
        return None
    _check_flags(flags)
    if None in (flags.coordinator, flags.count, flags.index):
        process = _ask_cluster(flags, settings.startup_timeout_s)
    else:
        process = ProcessInfo(flags.coordinator, flags.count, flags.index)
    if process is None or process.count == 1:
        return None
    _check_flags(LaunchFlags(process.coordinator, process.count, process.index))
    return process


def _check_flags(flags: LaunchFlags) -> None:
    if flags.coordinator is not None:
        host, _, port = flags.coordinator.rpartition(":")
        if not host or not port.isdecimal() or not 0 < int(port) < 65536:
            remedy = "Give the host and a free port of process 0, for example host-a:8476"
            raise UserError("--coordinator is not HOST:PORT", flags.coordinator, remedy)
    if flags.count is not None and flags.index is not None and flags.index >= flags.count:
        raise UserError(
            f"--process is not below --processes {flags.count}", flags.index, f"Give 0 to {flags.count - 1}"
        )


def _ask_cluster(flags: LaunchFlags, timeout_s: int) -> ProcessInfo | None:
    from jax._src.clusters import ClusterEnv  # jax.distributed.initialize uses it; jax has no public name for it.

    try:
        with warnings.catch_warnings():
            # jax warns in any pod without the package kubernetes, also where the run has one process.
            warnings.simplefilter("ignore")
            cluster = _cluster(ClusterEnv)
            count = flags.count
            if count is None and cluster is not None and cluster.name == "slurm" and _STEP_TASKS in os.environ:
                count = int(os.environ[_STEP_TASKS])
            coordinator, count, index, _ = ClusterEnv.auto_detect_unset_distributed_params(
                flags.coordinator, count, flags.index, None, None, timeout_s
            )
            hosts = {} if cluster is None else _cluster_hosts(cluster, count)
            local = None if cluster is None else local_devices(cluster.name, os.environ)
    except UserError:
        raise
    except Exception as error:  # Metadata servers, name services and cluster variables fail in many ways.
        remedy = "Give --coordinator HOST:PORT --processes N --process I, or --processes 1 for this machine alone"
        raise UserError("cannot detect from the cluster which process this is", first_line(error), remedy) from error
    known = {"--coordinator": coordinator, "--processes": count, "--process": index}
    missing = [flag for flag, value in known.items() if value is None]
    if not missing:
        return ProcessInfo(coordinator, int(count), int(index), local if count > 1 else None, hosts)
    if flags == LaunchFlags():
        return None
    given = ", ".join(flag for flag in known if flag not in missing)
    raise UserError(f"{missing[0]} is missing", f"only {given} is known", f"Give {' and '.join(missing)} as well")


def _cluster(environments: Any) -> Any:
    """The first of jax's cluster environments that is present, or None."""
    known = environments._cluster_types
    return next((cluster for cluster in known if not cluster.opt_in_only_method and cluster.is_env_present()), None)


def _cluster_hosts(cluster: Any, count: int | None) -> dict[int, str]:
    """process -> host, if the cluster lists a host for every process."""
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
    """Expands Slurm's short form of a list of hosts: `a[1-2,07],b` becomes a1, a2, a07, b."""
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
