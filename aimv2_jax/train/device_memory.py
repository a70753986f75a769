"""Memory that a run needs on every device, compared with what the devices have free, before anything compiles."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import jax

from aimv2_jax.errors import UserError
from aimv2_jax.train.builder import TrainSetup

_GIB = 2**30


def least_bytes(setup: TrainSetup) -> int:
    """Bytes of the state, the gradients and the batch on one device.

    A lower bound of a step's memory: clipping needs the norm of all gradients before the first one is used. Activations
    come on top of it; the compiler decides how much of them is held at a time.
    """
    state = setup.abstract_state
    batch = max(_bytes(setup.abstract_batch(shape)) for shape in setup.config.batch_shapes)
    return _bytes(state) + _bytes(state.params) + batch


def check_device_memory(setup: TrainSetup, devices: Sequence[jax.Device] | None = None) -> None:
    """Raises UserError if a device of this process (by default any of the mesh) has too little memory for the config.

    Devices that do not report their memory, such as CPUs, are not checked.
    """
    needed = least_bytes(setup)
    devices = setup.mesh.local_devices if devices is None else devices
    for device in devices:
        free = free_bytes(device)
        if free is None or free >= needed:
            continue
        raise UserError(
            "this config needs more memory than a device has free",
            f"at least {needed / _GIB:.2f} GiB for parameters, moments, gradients and a batch; "
            f"{free / _GIB:.2f} GiB free on {device}",
            "Raise mesh.fsdp, which splits them over more devices, end what else uses the device, or on a GPU set "
            "XLA_PYTHON_CLIENT_MEM_FRACTION=0.95 (jax takes 0.75 of its memory by default)",
        )


def free_bytes(device: jax.Device) -> int | None:
    """Bytes that jax may still allocate on a device; None where it does not report them."""
    stats = device.memory_stats() or {}
    return stats["bytes_limit"] - stats.get("bytes_in_use", 0) if "bytes_limit" in stats else None


def _bytes(tree: Any) -> int:
    """Bytes of the shards of a tree of abstract arrays on one device."""
    leaves = jax.tree.leaves(tree)
    return sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in leaves)
