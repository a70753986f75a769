"""Silent corruption: one step computed twice, and compared bit for bit.

A chip that computes wrongly says nothing: its numbers are finite and nearly right, and all that are trained from them
are wrong, too. The same program on the same numbers gives the same bits; where it doesn't, a device is broken. Where
a process has several devices, the second computation has them in another order, so that one which is always wrong in
the same way is found as well.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding

from aimv2_jax.config import BatchShape
from aimv2_jax.train.program import Program
from aimv2_jax.train.step import TrainState


class Difference(NamedTuple):
    """A leaf of state or metrics that came out different: its path, how many of its entries, on which devices."""

    leaf: str
    entries: int
    devices: tuple[str, ...]  # Of this process.


class Recompute:
    """Computes steps a second time.

    Args:
      program: of the run.
      compiled: its train step, by the shape of the batch.
      elsewhere: use the devices of each process in another order, where it has several; the step is then compiled once
        more.
    """

    def __init__(self, program: Program, compiled: Mapping[BatchShape, Any], elsewhere: bool):
        self._home, self._away = program.mesh, program.mesh
        self._rng, self._compiled = program.rng, compiled
        other = _rotated(program.mesh) if elsewhere else program.mesh
        if other != program.mesh:
            away = dataclasses.replace(program, mesh=other)
            self._away, self._rng = other, away.rng
            self._compiled = {shape: away.compile_step(shape) for shape in compiled}

    def start(self, state: TrainState, batch: Mapping[str, jax.Array], shape: BatchShape) -> Any:
        """Starts the step on copies; before the step itself takes over the state's memory. For `differences`."""
        return self._compiled[shape](*(_copied(tree, self._home, self._away) for tree in (state, batch)), self._rng)

    def differences(self, once: Any, again: Any) -> list[Difference]:
        """Where the two results differ: of the leaves all processes know alike, of devices each its own.

        `again` is used up: its memory is given back leaf by leaf, so that there are never three states.
        """
        again = _moved(again, self._away, self._home)
        paths = [path for path, _ in jax.tree.leaves_with_path(once)]
        # Device by device: where a leaf is whole on several, one of them may have it wrong.
        ours, theirs = _by_device(once), _by_device(again)
        counts = {device: np.asarray(jax.device_get(_count(ours[device], theirs[device]))) for device in ours}
        with jax.transfer_guard("allow"):
            total = multihost_utils.process_allgather(sum(counts.values())).reshape(-1, len(paths)).sum(axis=0)
        return [
            Difference(
                jax.tree_util.keystr(path, simple=True, separator="/"),
                int(total[place]),
                tuple(str(device) for device, own in counts.items() if own[place]),
            )
            for place, path in enumerate(paths)
            if total[place]
        ]


def _rotated(mesh: Mesh) -> Mesh:
    """The mesh with the next device of the same process in the place of each."""
    by_process: dict[int, list[jax.Device]] = {}
    for device in mesh.devices.flat:
        by_process.setdefault(device.process_index, []).append(device)
    after = {
        device: devices[(place + 1) % len(devices)]
        for devices in by_process.values()
        for place, device in enumerate(devices)
    }
    devices = np.array([after[device] for device in mesh.devices.flat]).reshape(mesh.devices.shape)
    return Mesh(devices, mesh.axis_names)


def _copied(tree: Any, source: Mesh, target: Mesh) -> Any:
    """Copies of the arrays of `tree`, from the places of one mesh to those of another; no byte leaves its host."""
    if source == target:
        return jax.tree.map(jnp.copy, tree)
    return jax.tree.map(partial(_placed, source=source, target=target), tree)


def _moved(tree: Any, source: Mesh, target: Mesh) -> Any:
    """The same without keeping those of `tree`."""
    if source == target:
        return tree

    def moved(array: jax.Array) -> jax.Array:
        placed = jax.block_until_ready(_placed(array, source, target))
        array.delete()
        return placed

    return jax.tree.map(moved, tree)


def _placed(array: jax.Array, source: Mesh, target: Mesh) -> jax.Array:
    place = dict(zip(source.devices.flat, target.devices.flat, strict=True))
    parts = [jax.device_put(shard.data, place[shard.device]) for shard in array.addressable_shards]
    return jax.make_array_from_single_device_arrays(array.shape, NamedSharding(target, array.sharding.spec), parts)


def _by_device(tree: Any) -> dict[jax.Device, list[jax.Array]]:
    """What each device of this process holds of every leaf."""
    parts: dict[jax.Device, list[jax.Array]] = {}
    for leaf in jax.tree.leaves(tree):
        for shard in leaf.addressable_shards:
            parts.setdefault(shard.device, []).append(shard.data)
    return parts


@jax.jit
def _count(once: list[jax.Array], again: list[jax.Array]) -> jax.Array:
    """How many entries of each leaf differ."""
    pairs = zip(once, again, strict=True)
    return jnp.stack([jnp.sum(_bits(one) != _bits(other), dtype=jnp.int32) for one, other in pairs])


def _bits(array: jax.Array) -> jax.Array:
    """The entries as whole numbers: two that are not numbers are the same where their bits are."""
    return jax.lax.bitcast_convert_type(array, jnp.dtype(f"uint{8 * array.dtype.itemsize}"))
