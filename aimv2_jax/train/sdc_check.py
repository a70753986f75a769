"""Silent data corruption check: computes one step twice and compares the results bit for bit.

A faulty chip raises no error: its results are finite and nearly right, and corrupt all later training. The same program
on the same inputs gives the same bits; otherwise a device is faulty. On a GPU that takes XLA's deterministic operations
(`builder.py` checks the options). If a process has several devices, the second computation can use them in another
order, which also finds a device that is always wrong in the same way; not on GPUs, where NCCL sums in the order of the
devices on its rings, so that another order gives other bits.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding

from aimv2_jax.config.schema import BatchShape
from aimv2_jax.errors import TrainingAborted
from aimv2_jax.monitoring.events import EventKind
from aimv2_jax.train.builder import TrainSetup
from aimv2_jax.train.resources import Resources
from aimv2_jax.train.step import TrainState


class Mismatch(NamedTuple):
    """A leaf of state or metrics that differs: its path, the number of differing entries, and the local devices."""

    leaf: str
    entries: int
    devices: tuple[str, ...]


class SdcCheck:
    """Computes steps a second time.

    Args:
      setup: the setup of the run.
      compiled: its train step by batch shape.
      rotate_devices: use the devices of each process in another order, if it has several; compiles the step again.
        Without effect on GPUs.
    """

    def __init__(self, setup: TrainSetup, compiled: Mapping[BatchShape, Any], rotate_devices: bool):
        self._mesh = setup.mesh
        rotate_devices &= setup.mesh.devices.flat[0].platform != "gpu"
        self._check_mesh = _rotated(setup.mesh) if rotate_devices else setup.mesh
        if self._check_mesh == self._mesh:
            self._rng = setup.rng
            self._compiled = compiled
        else:
            rotated_setup = dataclasses.replace(setup, mesh=self._check_mesh)
            self._rng = rotated_setup.rng
            self._compiled = {shape: rotated_setup.compile_step(shape) for shape in compiled}

    def start(self, state: TrainState, batch: Mapping[str, jax.Array], shape: BatchShape) -> Any:
        """Dispatches the step on copies, before the step itself donates the state; pass the result to `differences`."""
        inputs = (_copied(tree, self._mesh, self._check_mesh) for tree in (state, batch))
        return self._compiled[shape](*inputs, self._rng)

    def differences(self, first: Any, second: Any) -> list[Mismatch]:
        """Returns the leaves that differ, the same on all processes; each process lists its own devices.

        Consumes `second`: its memory is freed leaf by leaf, so that there are never three states.
        """
        second = _moved(second, self._check_mesh, self._mesh)
        paths = [path for path, _ in jax.tree.leaves_with_path(first)]
        # Compared per device, because one copy of a replicated leaf may be wrong.
        first_shards, second_shards = _by_device(first), _by_device(second)
        counts = {
            device: np.asarray(jax.device_get(_count_differences(shards, second_shards[device])))
            for device, shards in first_shards.items()
        }
        with jax.transfer_guard("allow"):
            total = multihost_utils.process_allgather(sum(counts.values())).reshape(-1, len(paths)).sum(axis=0)
        return [
            Mismatch(
                jax.tree_util.keystr(path, simple=True, separator="/"),
                int(total[index]),
                tuple(str(device) for device, local in counts.items() if local[index]),
            )
            for index, path in enumerate(paths)
            if total[index]
        ]


def abort_on_mismatch(number: int, mismatches: Sequence[Mismatch], resources: Resources) -> None:
    """Writes an event and raises TrainingAborted if the results of step `number` differ."""
    if not mismatches:
        return
    host = os.uname().nodename
    leaves = [f"{mismatch.leaf} in {mismatch.entries} entries" for mismatch in mismatches]
    devices = sorted({device for mismatch in mismatches for device in mismatch.devices})
    resources.events.write(EventKind.CORRUPTION, number, leaf=leaves, device=devices, host=host)
    more = f", and {len(leaves) - 1} more leaves" if len(leaves) > 1 else ""
    where = ", ".join(devices) or "none of its devices, but on a device of another host"
    raise TrainingAborted(
        f"step {number}, computed twice, differs: {leaves[0]}{more}, on {host} on {where}; nothing of it is saved, "
        f"{resources.newest_checkpoint()}. Exclude that host or device, and start the same command again"
    )


def _rotated(mesh: Mesh) -> Mesh:
    """Replaces each device of the mesh by the next one of the same process."""
    by_process: dict[int, list[jax.Device]] = {}
    for device in mesh.devices.flat:
        by_process.setdefault(device.process_index, []).append(device)
    next_device = {
        device: devices[(index + 1) % len(devices)]
        for devices in by_process.values()
        for index, device in enumerate(devices)
    }
    devices = np.array([next_device[device] for device in mesh.devices.flat]).reshape(mesh.devices.shape)
    return Mesh(devices, mesh.axis_names)


def _copied(tree: Any, source: Mesh, target: Mesh) -> Any:
    """Copies the arrays of `tree` from one mesh to another; no data leaves its host."""
    if source == target:
        return jax.tree.map(jnp.copy, tree)
    return jax.tree.map(partial(_on_mesh, source=source, target=target), tree)


def _moved(tree: Any, source: Mesh, target: Mesh) -> Any:
    """Like `_copied`, but frees the arrays of `tree`."""
    if source == target:
        return tree

    def moved(array: jax.Array) -> jax.Array:
        copy = jax.block_until_ready(_on_mesh(array, source, target))
        array.delete()
        return copy

    return jax.tree.map(moved, tree)


def _on_mesh(array: jax.Array, source: Mesh, target: Mesh) -> jax.Array:
    target_device = dict(zip(source.devices.flat, target.devices.flat, strict=True))
    parts = [jax.device_put(shard.data, target_device[shard.device]) for shard in array.addressable_shards]
    return jax.make_array_from_single_device_arrays(array.shape, NamedSharding(target, array.sharding.spec), parts)


def _by_device(tree: Any) -> dict[jax.Device, list[jax.Array]]:
    """Groups the shards of every leaf by local device."""
    parts: dict[jax.Device, list[jax.Array]] = {}
    for leaf in jax.tree.leaves(tree):
        for shard in leaf.addressable_shards:
            parts.setdefault(shard.device, []).append(shard.data)
    return parts


@jax.jit
def _count_differences(first: list[jax.Array], second: list[jax.Array]) -> jax.Array:
    """Number of differing entries per leaf."""
    pairs = zip(first, second, strict=True)
    return jnp.stack([jnp.sum(_bits(a) != _bits(b), dtype=jnp.int32) for a, b in pairs])


def _bits(array: jax.Array) -> jax.Array:
    """Reinterprets the entries as unsigned integers, so that NaNs with equal bits are equal."""
    return jax.lax.bitcast_convert_type(array, jnp.dtype(f"uint{8 * array.dtype.itemsize}"))
