"""Meshes over devices, and whose rows are whose."""

from __future__ import annotations

import jax
import numpy as np
import pytest

from aimv2_jax.errors import UserError
from aimv2_jax.parallel.mesh import build_mesh, check_batch, local_rows
from aimv2_jax.parallel.rules import batch_sharding


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
    """Where a tensor axis spans hosts, they read the same rows; every row is read by somebody."""
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
