"""Device mesh, and the batch rows of each process."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import Mesh, NamedSharding

from aimv2_jax.errors import UserError

AXES = ("slice", "data", "fsdp", "tensor")


def build_mesh(slices: int, data: int, fsdp: int, tensor: int, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Builds a mesh over all devices, slices outermost; one of the sizes within a slice may be -1 (all remaining).

    Where both `data` and `fsdp` are -1, `fsdp` takes the devices with fast links (of an island of GPUs, else of a
    slice) and `data` the rest. Only TPUs have slices that a mesh must follow. The `slice_index` of a GPU is the index
    of its island: its node, or its group of nodes joined by NVLink (XLA's GPU client). Islands are outermost, so that
    inner axes stay within one where they fit; `fsdp` may span islands (`spans_islands`), `tensor` may not.

    Raises:
      UserError: if the product of the sizes is not the number of devices, if the slices are not those of the hardware,
        or if `tensor` would span islands of GPUs.
    """
    devices = list(jax.devices() if devices is None else devices)
    islands = {_island(device) for device in devices}
    by_slice: dict[int, list[jax.Device]] = {}
    for device in devices:
        by_slice.setdefault(device.slice_index if _has_slices(device) else 0, []).append(device)
    if len(by_slice) == 1:  # One hardware slice, or no slices at all: the devices may be split in any way.
        devices.sort(key=lambda device: (_island(device), device.id))
        share = len(devices) // slices if len(devices) % slices == 0 else len(devices)
        by_slice = {i: devices[i * share : (i + 1) * share] for i in range(len(devices) // share)}
    if len(by_slice) != slices:
        raise UserError(
            "config mesh.slices does not fit the devices",
            f"{slices} for {len(devices)} devices in {len(by_slice)} slices",
            f"Set mesh.slices={len(by_slice)}",
        )
    share = len(devices) // slices
    if data == fsdp == -1:
        fsdp = max(1, min(share, len(devices) // len(islands)) // tensor)
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
        mesh = Mesh(np.stack([_arrange(by_slice[i], sizes) for i in sorted(by_slice)]), AXES)
    except NotImplementedError as error:  # The sizes cut across the rings of the torus.
        raise UserError(
            "config mesh.data x mesh.fsdp x mesh.tensor does not follow the axes of the topology",
            " x ".join(map(str, sizes)),
            "Choose sizes that are products of whole axes, such as mesh.fsdp=16 on v5e:16x16 or v5p:4x4x16",
        ) from error
    if spans_islands(mesh, "tensor"):
        raise UserError(
            "config mesh.tensor spans GPUs that no NVLink joins, and its sums in every layer would cross the network",
            f"{mesh.shape['tensor']} devices, {len(devices) // len(islands)} GPUs joined by NVLink",
            "Choose a mesh.tensor that divides the GPUs of a node",
        )
    return mesh


def spans_islands(mesh: Mesh, axis: str) -> bool:
    """Whether devices along an axis belong to several islands of GPUs, so that its collectives cross the network."""
    islands = np.vectorize(_island, otypes=[int])(mesh.devices)
    first = islands.take([0], axis=AXES.index(axis))
    return bool((islands != first).any())


def _island(device: jax.Device) -> int:
    """Index of the GPU's group of GPUs joined by NVLink; 0 for other devices."""
    return getattr(device, "slice_index", 0) if device.platform == "gpu" else 0


def _arrange(devices: Sequence[jax.Device], sizes: Sequence[int]) -> np.ndarray:
    """Devices as an array of `sizes`: GPUs in the order given, which jax would sort by id; others as jax does."""
    if devices[0].platform == "gpu":
        return np.array(devices, dtype=object).reshape(sizes)
    return mesh_utils.create_device_mesh(sizes, devices)


def _has_slices(device: jax.Device) -> bool:
    """Whether the device belongs to a TPU slice."""
    return device.platform == "tpu" and hasattr(device, "slice_index")


def check_batch(size: int, mesh: Mesh, key: str, microbatches: int = 1) -> None:
    """Raises UserError if `size` rows, the value of config `key`, do not divide evenly over the mesh."""
    shards = mesh.shape["slice"] * mesh.shape["data"] * mesh.shape["fsdp"]
    if size % (shards * microbatches):
        parts = f"{shards} devices" + (f" x {microbatches} microbatches" if microbatches > 1 else "")
        raise UserError(
            f"config {key} does not divide evenly over mesh.slices x mesh.data x mesh.fsdp",
            f"{size} rows, {parts}",
            f"Use a multiple of {shards * microbatches}",
        )


def local_rows(sharding: NamedSharding, size: int, devices: Sequence[jax.Device] | None = None) -> np.ndarray:
    """Returns the rows of a global batch held by `devices` (default: those of this process), ascending."""
    rows = np.arange(size)
    index_of = sharding.devices_indices_map((size,))
    devices = sharding.addressable_devices if devices is None else devices
    return np.unique(np.concatenate([rows[index_of[device]] for device in devices]))
