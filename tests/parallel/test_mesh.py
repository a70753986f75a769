"""Device meshes, and the batch rows of each process."""

from __future__ import annotations

import dataclasses
import subprocess
import sys

import jax
import numpy as np
import pytest

from aimv2_jax.errors import UserError
from aimv2_jax.parallel.mesh import build_mesh, check_batch, local_rows, spans_islands
from aimv2_jax.parallel.rules import batch_sharding
from tests.helpers.tiny import ROOT


@pytest.mark.parametrize(
    ("sizes", "shape"),
    [((-1, 1, 1), (8, 1, 1)), ((2, -1, 2), (2, 2, 2)), ((1, 4, 2), (1, 4, 2)), ((1, 8, -1), (1, 8, 1))],
)
def test_mesh_when_one_size_is_left_open_then_it_takes_the_rest(sizes, shape):
    assert tuple(build_mesh(1, *sizes).shape.values()) == (1, *shape)


@pytest.mark.parametrize("sizes", [(3, 1, 1), (-1, 3, 1), (16, 1, 1), (4, 1, 1)])
def test_mesh_when_sizes_do_not_fit_the_devices_then_refused(sizes):
    with pytest.raises(UserError, match="for 8 devices"):
        build_mesh(1, *sizes)


@dataclasses.dataclass(frozen=True)
class Gpu:
    """Stand-in for a jax GPU device with the attributes that `build_mesh` uses.

    XLA's GPU client gives every device a `slice_index`, which counts the hosts by their boot id, or the groups of hosts
    joined by NVLink (jax-ml/jax#13021, openxla/xla#23347). `jax.devices()` is ordered by process; ids follow the
    topology, so the ids of a host are consecutive (the comment on GPUs in jax's `create_device_mesh`).
    """

    id: int
    process_index: int
    slice_index: int
    platform: str = "gpu"
    device_kind: str = "NVIDIA H100 80GB HBM3"


def gpus(nodes: int, per_node: int = 8) -> list[Gpu]:
    """Devices whose process indices descend while ids ascend, as some schedulers assign them."""
    return [
        Gpu(node * per_node + i, nodes - 1 - node, node) for node in reversed(range(nodes)) for i in range(per_node)
    ]


@pytest.mark.parametrize(
    ("sizes", "shape"),
    [
        ((1, -1, 1, 1), (1, 32, 1, 1)),  # The default mesh on four nodes.
        ((1, -1, 16, 1), (1, 2, 16, 1)),
        ((1, 1, 32, 1), (1, 1, 32, 1)),
        ((4, -1, 8, 1), (4, 1, 8, 1)),
        ((2, -1, 8, 2), (2, 1, 8, 2)),
        ((1, -1, -1, 1), (1, 4, 8, 1)),
        ((1, -1, -1, 2), (1, 4, 4, 2)),
        ((8, -1, -1, 1), (8, 1, 4, 1)),
    ],
)
def test_mesh_on_gpu_nodes(sizes, shape):
    """GPU nodes are not slices: an axis may span them, and the innermost axes stay within a node."""
    mesh = build_mesh(*sizes, devices=gpus(4))
    assert tuple(mesh.shape.values()) == shape
    assert [device.id for device in mesh.devices.flat] == list(range(32))
    assert spans_islands(mesh, "fsdp") is (shape[2] > 8 or shape[2:] == (8, 2))
    assert not spans_islands(mesh, "tensor")


@pytest.mark.parametrize("devices", [gpus(4), gpus(2, 4)], ids=["4x8", "2x4"])
def test_mesh_of_gpus_with_scattered_ids(devices):
    """Islands stay together where ids go round the nodes: an fsdp axis of a node's GPUs is within one."""
    nodes = len({device.slice_index for device in devices})
    dealt = [dataclasses.replace(gpu, id=gpu.id % 8 * nodes + gpu.slice_index) for gpu in devices]
    mesh = build_mesh(1, -1, -1, 1, devices=dealt)
    assert mesh.shape["data"] == nodes and not spans_islands(mesh, "fsdp") and spans_islands(mesh, "data")


def test_mesh_of_gpus_whose_tensor_axis_spans_nodes():
    """Sums of every layer over the network are refused; within a node, or a group with NVLink, they are not."""
    with pytest.raises(UserError, match=r"mesh\.tensor spans GPUs.*'16 devices, 8 GPUs joined by NVLink'"):
        build_mesh(1, -1, 1, 16, devices=gpus(4))
    joined = [dataclasses.replace(gpu, slice_index=gpu.slice_index // 2) for gpu in gpus(4)]
    assert build_mesh(1, -1, 1, 16, devices=joined).shape["tensor"] == 16


def test_mesh_with_open_data_and_fsdp_without_islands():
    """CPUs, and GPUs without `slice_index`, are one island."""
    assert tuple(build_mesh(1, -1, -1, 2).shape.values()) == (1, 1, 4, 2)
    assert tuple(build_mesh(2, -1, -1, 1).shape.values()) == (2, 1, 4, 1)


TPUS = """
from aimv2_jax.aot.topology import described_devices, parse_topology
from aimv2_jax.errors import UserError
from aimv2_jax.parallel.mesh import build_mesh

devices = described_devices(parse_topology("v5e:2x2", 2))
print({device.platform for device in devices}, dict(build_mesh(2, -1, 1, 1, devices).shape))
try:
    build_mesh(1, -1, 1, 1, devices)
except UserError as error:
    print(error)
"""


def test_mesh_on_two_slices_of_tpus():
    """On TPUs, as described by libtpu, `mesh.slices` must be the number of hardware slices."""
    pytest.importorskip("libtpu")
    done = subprocess.run([sys.executable, "-c", TPUS], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "{'tpu'} {'slice': 2, 'data': 4," in done.stdout
    assert "1 for 8 devices in 2 slices" in done.stdout and "Set mesh.slices=2" in done.stdout


def test_batch_when_it_does_not_divide_over_the_devices_then_refused_naming_the_key():
    mesh = build_mesh(1, 2, 2, 2)
    check_batch(12, mesh, "data.batch_size")
    with pytest.raises(UserError, match=r"data\.batch_size.*Use a multiple of 4"):
        check_batch(10, mesh, "data.batch_size")
    with pytest.raises(UserError, match=r"3 microbatches.*Use a multiple of 12"):
        check_batch(16, mesh, "data.batch_size", microbatches=3)


@pytest.mark.parametrize("sizes", [(8, 1, 1), (2, 4, 1), (2, 2, 2), (1, 1, 8)])
def test_local_rows_when_one_process_holds_all_devices_then_every_row_once(sizes):
    np.testing.assert_array_equal(local_rows(batch_sharding(build_mesh(1, *sizes)), 16), np.arange(16))


@pytest.mark.parametrize("hosts", [1, 2, 4])
@pytest.mark.parametrize("sizes", [(4, 2, 1), (2, 1, 4), (1, 2, 4)])
def test_local_rows_when_devices_are_dealt_to_hosts_then_each_reads_what_its_devices_hold(hosts, sizes):
    """Hosts that share a tensor axis read the same rows; every row is read by at least one host."""
    sharding = batch_sharding(build_mesh(1, *sizes))
    devices = sorted(jax.devices(), key=lambda device: device.id)
    share = len(devices) // hosts
    array = jax.device_put(np.arange(32), sharding)
    read = []
    for i in range(hosts):
        own = devices[i * share : (i + 1) * share]
        read.append(local_rows(sharding, 32, own))
        held = {int(row) for shard in array.addressable_shards if shard.device in own for row in shard.data}
        assert read[-1].tolist() == sorted(held)
    assert set(np.concatenate(read).tolist()) == set(range(32))
