"""The mesh of devices, and which rows of a batch this process holds."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import Mesh, NamedSharding

from aimv2_jax.errors import UserError

AXES = ("slice", "data", "fsdp", "tensor")


def build_mesh(slices: int, data: int, fsdp: int, tensor: int, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A mesh over all devices, slices outermost; one of the sizes within a slice may be -1 and takes what is left.

    Only TPUs have slices that a mesh must follow. A GPU has a `slice_index`, too, but that is the number of its node,
    or of the nodes that NVLink joins (XLA's GPU client): axes may span them, and `mesh.slices` may be any divisor.

    Raises:
      UserError: where the sizes don't multiply to the number of devices, or slices are not those of the hardware.
    """
    devices = list(jax.devices() if devices is None else devices)
    by_slice: dict[int, list[jax.Device]] = {}
    for device in devices:
        by_slice.setdefault(device.slice_index if _has_slices(device) else 0, []).append(device)
    if len(by_slice) == 1:  # One slice, or devices that know of none: any split of them will do.
        devices.sort(key=lambda device: device.id)  # Neighbours are on one node.
        share = len(devices) // slices if len(devices) % slices == 0 else len(devices)
        by_slice = {i: devices[i * share : (i + 1) * share] for i in range(len(devices) // share)}
    if len(by_slice) != slices:
        raise UserError(
            "config mesh.slices does not fit the devices",
            f"{slices} for {len(devices)} devices in {len(by_slice)} slices",
            f"Set mesh.slices={len(by_slice)}",
        )
    share = len(devices) // slices
    sizes = [data, fsdp, tensor]
    fixed = -np.prod(sizes) if -1 in sizes else np.prod(sizes)
    if -1 in sizes and share % fixed == 0:
        sizes[sizes.index(-1)] = share // int(fixed)
    elif fixed != share:
        raise UserError(
            "config mesh.data x mesh.fsdp x mesh.tensor does not fit the devices",
            f"{data} x {fsdp} x {tensor} for {share} devices" + (" of each slice" if slices > 1 else ""),
            "Choose sizes whose product is the number of devices, or set one of them to -1",
        )
    try:
        return Mesh(np.stack([mesh_utils.create_device_mesh(sizes, by_slice[i]) for i in sorted(by_slice)]), AXES)
    except NotImplementedError as error:  # Sizes that cut across the rings of the torus.
        raise UserError(
            "config mesh.data x mesh.fsdp x mesh.tensor does not lie along the axes of the topology",
            " x ".join(map(str, sizes)),
            "Choose sizes that are products of whole axes, such as mesh.fsdp=16 on v5e:16x16 or v5p:4x4x16",
        ) from error


def _has_slices(device: jax.Device) -> bool:
    """Whether the device lies in a slice of TPUs."""
    return device.platform == "tpu" and hasattr(device, "slice_index")


def check_batch(size: int, mesh: Mesh, key: str, microbatches: int = 1) -> None:
    """Raises UserError where `size` rows, the value of config `key`, don't divide evenly over the mesh."""
    shards = mesh.shape["slice"] * mesh.shape["data"] * mesh.shape["fsdp"]
    if size % (shards * microbatches):
        parts = f"{shards} devices" + (f" x {microbatches} microbatches" if microbatches > 1 else "")
        raise UserError(
            f"config {key} does not divide over the devices of mesh.slices x mesh.data x mesh.fsdp",
            f"{size} rows, {parts}",
            f"Use a multiple of {shards * microbatches}",
        )


def local_rows(sharding: NamedSharding, size: int, devices: Sequence[jax.Device] | None = None) -> np.ndarray:
    """The rows of a global batch that `devices` (this process', unless given) hold, ascending."""
    rows = np.arange(size)
    index_of = sharding.devices_indices_map((size,))
    devices = sharding.addressable_devices if devices is None else devices
    return np.unique(np.concatenate([rows[index_of[device]] for device in devices]))
