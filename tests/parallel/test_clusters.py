"""Which process this is: by flags, by a cluster's own variables, and by none."""

from __future__ import annotations

import pytest
from jax._src.clusters import cloud_tpu_cluster

from aimv2_jax.config import ProcessesConfig
from aimv2_jax.errors import UserError
from aimv2_jax.parallel.clusters import Launch, Place, expand_nodes, find_place

SETTINGS = ProcessesConfig(5, 100, 300)
SLURM = {
    "SLURM_JOB_ID": "4242",
    "SLURM_STEP_NODELIST": "tpu[07-08]",
    "SLURM_NTASKS": "2",
    "SLURM_PROCID": "1",
    "SLURM_LOCALID": "0",
}


@pytest.fixture
def set_variables(monkeypatch):
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
    assert (place.count, place.index, place.local_devices) == (2, 1, (0,))
    assert place.address[0] == "tpu07" and place.hosts == {0: "tpu07", 1: "tpu08"}
    assert find_place(Launch(coordinator="other:99"), SETTINGS).coordinator == "other:99"
    assert find_place(Launch(count=1), SETTINGS) is None


def test_place_when_slurm_runs_one_task_then_one_process(set_variables):
    set_variables(SLURM | {"SLURM_NTASKS": "1", "SLURM_PROCID": "0"})
    assert find_place(Launch(), SETTINGS) is None


def test_place_when_gke_says_it_then_with_the_hosts_of_all(set_variables, monkeypatch):
    monkeypatch.setattr(cloud_tpu_cluster, "running_in_cloud_tpu_vm", True)
    variables = {"TPU_WORKER_HOSTNAMES": "localhost,b,c", "TPU_WORKER_ID": "2"}
    variables |= {"MEGASCALE_COORDINATOR_ADDRESS": "", "MEGASCALE_NUM_SLICES": "2", "MEGASCALE_SLICE_ID": "1"}
    set_variables(variables)
    place = find_place(Launch(), SETTINGS)
    assert (place.coordinator, place.count, place.index) == ("localhost:8482", 6, 5)
    assert place.hosts == {3: "localhost", 4: "b", 5: "c"}  # Those of its slice.


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
    set_variables(SLURM | {"SLURM_NTASKS": "many"})
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
        ("host-a:80", "[::]:80"),
        ("[fe::1]:80", "[::]:80"),
    ],
)
def test_coordinator_when_it_is_this_machine_then_no_network_reaches_it(coordinator, bind):
    assert Place(coordinator, 2, 0).bind_address == bind
