"""Detection of the process index and count from flags, from cluster variables, and without either."""

from __future__ import annotations

import socket

import pytest
from jax._src.clusters import cloud_tpu_cluster

from aimv2_jax.config.schema import ProcessesConfig
from aimv2_jax.distributed.cluster import LaunchFlags, ProcessInfo, expand_nodes, find_process
from aimv2_jax.errors import UserError

SETTINGS = ProcessesConfig(5, 100, 300)


def srun(index: int, nodes: str = "gpu[07-08]", tasks: str = "1(x2)", count: int = 2, **others: str) -> dict[str, str]:
    """Variables that srun sets for a task of a step with 8 GPUs per node (srun(1), Slurm's src/common/env.c)."""
    step = {
        "SLURM_JOB_ID": "4242",
        "SLURM_STEP_NODELIST": nodes,
        "SLURM_STEP_NUM_NODES": str(len(expand_nodes(nodes))),
        "SLURM_STEP_NUM_TASKS": str(count),
        "SLURM_STEP_TASKS_PER_NODE": tasks,
        "SLURM_TASKS_PER_NODE": tasks,
        "SLURM_NTASKS": str(count),
        "SLURM_PROCID": str(index),
        "SLURM_LOCALID": str(index % int(tasks[0])),
        "SLURM_NODEID": str(index // int(tasks[0])),
        "SLURM_GPUS_ON_NODE": "8",
        "CUDA_VISIBLE_DEVICES": "0,1,2,3,4,5,6,7",
    }
    return step | others


SLURM = srun(1)


@pytest.fixture
def set_variables(monkeypatch):
    monkeypatch.delenv("JAX_PLATFORMS")  # The test suite sets it, but a cluster's processes use GPUs.

    def set_them(variables):
        for name, value in variables.items():
            monkeypatch.setenv(name, value)

    return set_them


def test_place_when_nothing_says_otherwise_then_one_process():
    assert find_process(LaunchFlags(), SETTINGS) is None


def test_place_when_flags_say_it_then_as_they_say():
    assert find_process(LaunchFlags("host-a:8476", 4, 3), SETTINGS) == ProcessInfo("host-a:8476", 4, 3)


def test_place_when_slurm_says_it_then_with_the_hosts_of_all(set_variables):
    set_variables(SLURM)
    process = find_process(LaunchFlags(), SETTINGS)
    assert (process.count, process.index, process.local_devices) == (2, 1, None)  # All GPUs of its node.
    assert process.address[0] == "gpu07" and process.hosts == {0: "gpu07", 1: "gpu08"}
    assert find_process(LaunchFlags(coordinator="other:99"), SETTINGS).coordinator == "other:99"
    assert find_process(LaunchFlags(count=1), SETTINGS) is None


def test_place_when_slurm_runs_a_step_of_a_larger_job(set_variables):
    """Under `srun --preserve-env` the job's variables are also set, but the step's take precedence."""
    set_variables(srun(1, SLURM_NTASKS="16", SLURM_TASKS_PER_NODE="8(x2)", SLURM_NTASKS_PER_NODE="8"))
    process = find_process(LaunchFlags(), SETTINGS)
    assert (process.count, process.local_devices, process.hosts) == (2, None, {0: "gpu07", 1: "gpu08"})


def test_place_when_slurm_runs_several_a_node(set_variables):
    set_variables(srun(3, tasks="2(x2)", count=4))
    process = find_process(LaunchFlags(), SETTINGS)
    assert (process.count, process.index, process.local_devices) == (4, 3, (4, 5, 6, 7))


@pytest.mark.parametrize(("size", "devices"), [(1, None), (2, (4, 5, 6, 7))])
def test_place_when_open_mpi_says_it(size, devices, set_variables):
    """Variables that mpirun of Open MPI 4 sets for the second rank of a node; jax detects it by the first one."""
    uri = "1531576320.0;tcp://10.96.0.1,10.148.0.1:34911"
    ranks = {"OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_RANK": "1"}
    ranks |= {"OMPI_COMM_WORLD_LOCAL_SIZE": str(size), "OMPI_COMM_WORLD_LOCAL_RANK": str(size - 1)}
    visible = {"CUDA_VISIBLE_DEVICES": "0,1,2,3,4,5,6,7", "SLURM_GPUS_ON_NODE": "8"}
    set_variables({"OMPI_MCA_orte_hnp_uri": uri} | ranks | visible)
    process = find_process(LaunchFlags(), SETTINGS)
    assert (process.address[0], process.count, process.index, process.local_devices) == ("10.96.0.1", 4, 1, devices)


def test_place_when_slurm_runs_one_task_then_one_process(set_variables):
    set_variables(srun(0, "gpu07", "1", 1))
    assert find_process(LaunchFlags(), SETTINGS) is None


def test_place_when_gke_says_it_then_with_the_hosts_of_all(set_variables, monkeypatch):
    monkeypatch.setattr(cloud_tpu_cluster, "running_in_cloud_tpu_vm", True)
    hosts = [f"aimv2-slice-1-{pod}.aimv2" for pod in range(3)]
    # GKE lists the hosts of the pod's own slice and gives all slices the first host of slice 0, which must resolve
    # (jax's GkeTpuCluster).
    variables = {"TPU_WORKER_HOSTNAMES": ",".join(hosts), "TPU_WORKER_ID": "2", "MEGASCALE_NUM_SLICES": "2"}
    set_variables(variables | {"MEGASCALE_COORDINATOR_ADDRESS": "localhost:8080", "MEGASCALE_SLICE_ID": "1"})
    process = find_process(LaunchFlags(), SETTINGS)
    assert (process.coordinator, process.count, process.index) == ("localhost:8482", 6, 5)
    assert process.hosts == dict(enumerate(hosts, start=3)) and process.local_devices is None


@pytest.mark.parametrize(
    ("launch", "words"),
    [
        (LaunchFlags("host-a", 2, 0), "--coordinator is not HOST:PORT: 'host-a'"),
        (LaunchFlags("host-a:99999", 2, 0), "--coordinator is not HOST:PORT"),
        (LaunchFlags("host-a:1", 2, 2), "--process is not below --processes 2: 2"),
        (
            LaunchFlags(count=2),
            "--coordinator is missing: 'only --processes is known'. Give --coordinator and --process",
        ),
        (LaunchFlags("host-a:1", None, 0), "--processes is missing"),
    ],
)
def test_find_process_invalid_flags(launch, words):
    """Launch flags that do not fit together raise UserError."""
    with pytest.raises(UserError) as raised:
        find_process(launch, SETTINGS)
    assert words in str(raised.value)


def test_find_process_unreadable_cluster(set_variables):
    """Variables of a cluster that cannot be read raise UserError."""
    set_variables(SLURM | {"SLURM_STEP_NUM_TASKS": "many"})
    with pytest.raises(UserError, match=r"cannot detect from the cluster which process this is.*--processes 1"):
        find_process(LaunchFlags(), SETTINGS)


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("", []),
        ("a", ["a"]),
        ("a,b-1", ["a", "b-1"]),
        ("n[1-3]", ["n1", "n2", "n3"]),
        ("n[008-010,12],m", ["n008", "n009", "n010", "n12", "m"]),
        ("r[1-2]n[3,4]", ["r1n3", "r1n4", "r2n3", "r2n4"]),
    ],
)
def test_nodes_when_in_slurms_short_form_then_each(text, names):
    assert expand_nodes(text) == names


@pytest.mark.parametrize(
    ("coordinator", "bind"),
    [
        ("localhost:80", "localhost:80"),
        ("127.0.0.1:80", "127.0.0.1:80"),
        ("127.0.0.2:80", "127.0.0.2:80"),
        ("host-a:80", "[::]:80"),  # Other hosts may resolve the name to another address.
        ("192.0.2.1:80", "[::]:80"),  # Reserved (RFC 5737), so not an address of this machine.
        ("[fe::1]:80", "[::]:80"),
    ],
)
def test_coordinator_listens_on_its_own_address_only(coordinator, bind):
    assert ProcessInfo(coordinator, 2, 0).bind_address == bind


def test_coordinator_on_an_address_of_this_machine():
    """Uses this machine's address for outgoing traffic, if it has one; no packet is sent."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))
        except OSError:
            pytest.skip("no network")
        address = probe.getsockname()[0]
    assert ProcessInfo(f"{address}:80", 2, 0).bind_address == f"{address}:80"
