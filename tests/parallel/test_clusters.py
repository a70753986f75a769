"""Which process this is: by flags, by a cluster's own variables, and by none."""

from __future__ import annotations

import socket

import pytest
from jax._src.clusters import cloud_tpu_cluster

from aimv2_jax.config import ProcessesConfig
from aimv2_jax.errors import UserError
from aimv2_jax.parallel.clusters import Launch, Place, expand_nodes, find_place

SETTINGS = ProcessesConfig(5, 100, 300)


def srun(index: int, nodes: str = "gpu[07-08]", tasks: str = "1(x2)", count: int = 2, **others: str) -> dict[str, str]:
    """What srun sets for a task of a step with 8 GPUs a node (srun(1), and Slurm's src/common/env.c)."""
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
    monkeypatch.delenv("JAX_PLATFORMS")  # Of these tests: a cluster's processes take GPUs.

    def set_them(variables):
        for name, value in variables.items():
            monkeypatch.setenv(name, value)

    return set_them


def test_place_when_nothing_says_otherwise_then_one_process():
    assert find_place(Launch(), SETTINGS) is None


def test_place_when_flags_say_it_then_as_they_say():
    assert find_place(Launch("host-a:8476", 4, 3), SETTINGS) == Place("host-a:8476", 4, 3)


def test_place_when_slurm_says_it_then_with_the_hosts_of_all(set_variables):
    set_variables(SLURM)
    place = find_place(Launch(), SETTINGS)
    assert (place.count, place.index, place.local_devices) == (2, 1, None)  # All GPUs of its node.
    assert place.address[0] == "gpu07" and place.hosts == {0: "gpu07", 1: "gpu08"}
    assert find_place(Launch(coordinator="other:99"), SETTINGS).coordinator == "other:99"
    assert find_place(Launch(count=1), SETTINGS) is None


def test_place_when_slurm_runs_a_step_of_a_larger_job(set_variables):
    """Under `srun --preserve-env` the job's numbers stand beside the step's, which count."""
    set_variables(srun(1, SLURM_NTASKS="16", SLURM_TASKS_PER_NODE="8(x2)", SLURM_NTASKS_PER_NODE="8"))
    place = find_place(Launch(), SETTINGS)
    assert (place.count, place.local_devices, place.hosts) == (2, None, {0: "gpu07", 1: "gpu08"})


def test_place_when_slurm_runs_several_a_node(set_variables):
    set_variables(srun(3, tasks="2(x2)", count=4))
    place = find_place(Launch(), SETTINGS)
    assert (place.count, place.index, place.local_devices) == (4, 3, (4, 5, 6, 7))


@pytest.mark.parametrize(("size", "devices"), [(1, None), (2, (4, 5, 6, 7))])
def test_place_when_open_mpi_says_it(size, devices, set_variables):
    """What mpirun of Open MPI 4 sets for the second rank of a node; jax knows it by the first variable."""
    uri = "1531576320.0;tcp://10.96.0.1,10.148.0.1:34911"
    ranks = {"OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_RANK": "1"}
    ranks |= {"OMPI_COMM_WORLD_LOCAL_SIZE": str(size), "OMPI_COMM_WORLD_LOCAL_RANK": str(size - 1)}
    visible = {"CUDA_VISIBLE_DEVICES": "0,1,2,3,4,5,6,7", "SLURM_GPUS_ON_NODE": "8"}
    set_variables({"OMPI_MCA_orte_hnp_uri": uri} | ranks | visible)
    place = find_place(Launch(), SETTINGS)
    assert (place.address[0], place.count, place.index, place.local_devices) == ("10.96.0.1", 4, 1, devices)


def test_place_when_slurm_runs_one_task_then_one_process(set_variables):
    set_variables(srun(0, "gpu07", "1", 1))
    assert find_place(Launch(), SETTINGS) is None


def test_place_when_gke_says_it_then_with_the_hosts_of_all(set_variables, monkeypatch):
    monkeypatch.setattr(cloud_tpu_cluster, "running_in_cloud_tpu_vm", True)
    hosts = [f"aimv2-slice-1-{pod}.aimv2" for pod in range(3)]
    # GKE lists the hosts of the pod's own slice, and tells all slices the first host of slice 0, a name that must
    # resolve (jax's GkeTpuCluster).
    variables = {"TPU_WORKER_HOSTNAMES": ",".join(hosts), "TPU_WORKER_ID": "2", "MEGASCALE_NUM_SLICES": "2"}
    set_variables(variables | {"MEGASCALE_COORDINATOR_ADDRESS": "localhost:8080", "MEGASCALE_SLICE_ID": "1"})
    place = find_place(Launch(), SETTINGS)
    assert (place.coordinator, place.count, place.index) == ("localhost:8482", 6, 5)
    assert place.hosts == dict(enumerate(hosts, start=3)) and place.local_devices is None


@pytest.mark.parametrize(
    ("launch", "words"),
    [
        (Launch("host-a", 2, 0), "--coordinator is not HOST:PORT: 'host-a'"),
        (Launch("host-a:99999", 2, 0), "--coordinator is not HOST:PORT"),
        (Launch("host-a:1", 2, 2), "--process is not below --processes 2: 2"),
        (Launch(count=2), "--coordinator is missing: 'only --processes is known'. Give --coordinator and --process"),
        (Launch("host-a:1", None, 0), "--processes is missing"),
    ],
)
def test_place_when_flags_do_not_fit_then_the_user_is_told(launch, words):
    with pytest.raises(UserError) as raised:
        find_place(launch, SETTINGS)
    assert words in str(raised.value)


def test_place_when_the_cluster_cannot_be_read_then_the_user_is_told(set_variables):
    set_variables(SLURM | {"SLURM_STEP_NUM_TASKS": "many"})
    with pytest.raises(UserError, match=r"the cluster does not say which process this is.*--processes 1"):
        find_place(Launch(), SETTINGS)


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
        ("host-a:80", "[::]:80"),  # Others may know the name by another address.
        ("192.0.2.1:80", "[::]:80"),  # Of no machine (RFC 5737), so of a gateway.
        ("[fe::1]:80", "[::]:80"),
    ],
)
def test_coordinator_listens_on_its_own_address_only(coordinator, bind):
    assert Place(coordinator, 2, 0).bind_address == bind


def test_coordinator_on_an_address_of_this_machine():
    """The address by which this machine reaches others, if it has one: no packet is sent."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))
        except OSError:
            pytest.skip("no network")
        address = probe.getsockname()[0]
    assert Place(f"{address}:80", 2, 0).bind_address == f"{address}:80"
