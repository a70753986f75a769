"""The mesh of devices, and which rows of a batch this process holds."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import Mesh, NamedSharding

from aimv2_jax.errors import UserError

AXES = ("data", "fsdp", "tensor")


def build_mesh(data: int, fsdp: int, tensor: int, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A mesh over all devices; one size may be -1 and takes what is left.

    Raises:
      UserError: where the sizes don't multiply to the number of devices.
    """
    devices = list(jax.devices() if devices is None else devices)
    sizes = [data, fsdp, tensor]
    fixed = -np.prod(sizes) if -1 in sizes else np.prod(sizes)
    if -1 in sizes and len(devices) % fixed == 0:
        sizes[sizes.index(-1)] = len(devices) // int(fixed)
    elif fixed != len(devices):
        raise UserError(
            "config mesh.data x mesh.fsdp x mesh.tensor does not fit the devices",
            f"{data} x {fsdp} x {tensor} for {len(devices)} devices",
            "Choose sizes whose product is the number of devices, or set one of them to -1",
        )
    return Mesh(mesh_utils.create_device_mesh(sizes, devices), AXES)


def check_batch(size: int, mesh: Mesh, key: str, microbatches: int = 1) -> None:
    """Raises UserError where `size` rows, the value of config `key`, don't divide evenly over the mesh."""
    shards = mesh.shape["data"] * mesh.shape["fsdp"]
    if size % (shards * microbatches):
        parts = f"{shards} devices" + (f" x {microbatches} microbatches" if microbatches > 1 else "")
        raise UserError(
            f"config {key} does not divide over the devices of mesh.data x mesh.fsdp",
            f"{size} rows, {parts}",
            f"Use a multiple of {shards * microbatches}",
        )


def local_rows(sharding: NamedSharding, size: int, devices: Sequence[jax.Device] | None = None) -> np.ndarray:
    """The rows of a global batch that `devices` (this process', unless given) hold, ascending."""
    rows = np.arange(size)
    index_of = sharding.devices_indices_map((size,))
    devices = sharding.addressable_devices if devices is None else devices
    return np.unique(np.concatenate([rows[index_of[device]] for device in devices]))
