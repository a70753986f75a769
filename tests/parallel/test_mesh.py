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
    assert tuple(build_mesh(*sizes).shape.values()) == shape


@pytest.mark.parametrize("sizes", [(3, 1, 1), (-1, 3, 1), (16, 1, 1), (4, 1, 1)])
def test_mesh_when_sizes_do_not_fit_the_devices_then_refused(sizes):
    with pytest.raises(UserError, match="for 8 devices"):
        build_mesh(*sizes)


def test_batch_when_it_does_not_divide_over_the_devices_then_refused_naming_the_key():
    mesh = build_mesh(2, 2, 2)
    check_batch(12, mesh, "data.batch_size")
    with pytest.raises(UserError, match=r"data\.batch_size.*Use a multiple of 4"):
        check_batch(10, mesh, "data.batch_size")
    with pytest.raises(UserError, match=r"3 microbatches.*Use a multiple of 12"):
        check_batch(16, mesh, "data.batch_size", microbatches=3)


@pytest.mark.parametrize("sizes", [(8, 1, 1), (2, 4, 1), (2, 2, 2), (1, 1, 8)])
def test_local_rows_when_one_process_holds_all_devices_then_every_row_once(sizes):
    np.testing.assert_array_equal(local_rows(batch_sharding(build_mesh(*sizes)), 16), np.arange(16))


@pytest.mark.parametrize("hosts", [1, 2, 4])
def test_rows_when_devices_are_dealt_to_hosts_then_the_slices_make_up_the_batch(hosts):
    """What `local_rows` reads per process, for the devices that 1, 2 or 4 hosts would own."""
    sharding = batch_sharding(build_mesh(4, 2, 1))
    index_of = sharding.devices_indices_map((32,))
    devices = sorted(jax.devices(), key=lambda device: device.id)
    share = len(devices) // hosts
    slices = [
        np.unique(np.concatenate([np.arange(32)[index_of[device]] for device in devices[i * share : (i + 1) * share]]))
        for i in range(hosts)
    ]
    np.testing.assert_array_equal(np.sort(np.concatenate(slices)), np.arange(32))
