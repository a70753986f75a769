"""Describing the devices of a slice that is not here. The environment of libtpu is set here and nowhere else."""

from __future__ import annotations

import dataclasses
import importlib.util
import math
import os
import re
from typing import Any

from aimv2_jax.aot.chips import Chip, find_chip
from aimv2_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Topology:
    """A slice by name ("v5e:16x16"), and how many of them."""

    name: str
    slices: int
    chip: Chip
    shape: tuple[int, ...]  # Chips along each axis of one slice's interconnect.

    @property
    def chips_per_slice(self) -> int:
        return math.prod(self.shape)

    @property
    def num_chips(self) -> int:
        return self.slices * self.chips_per_slice


def parse_topology(name: str, slices: int = 1) -> Topology:
    """ "v5e:16x16" as a Topology; raises UserError where it is no such name."""
    match = re.fullmatch(r"(\w+):(\d+(?:x\d+)*)", name)
    if not match or any(int(size) < 1 for size in match[2].split("x")):
        raise UserError("--topology is not CHIP:SHAPE", name, "Write for example v5e:16x16, v5p:4x4x16 or v6e:16x16")
    return Topology(name, slices, find_chip(match[1]), tuple(int(size) for size in match[2].split("x")))


def require_libtpu() -> None:
    """Raises UserError where the TPU compiler is not installed."""
    if importlib.util.find_spec("libtpu") is None:
        raise UserError("the TPU compiler is not installed", "libtpu", "Install it with pip install -e .[tpu]")


def set_environment(topology: Topology) -> None:
    """Before jax starts: no TPU is looked for, and the one that is described is no other."""
    count = topology.chips_per_slice * topology.chip.cores_counted
    os.environ.update(
        JAX_PLATFORMS="cpu",
        TPU_SKIP_MDS_QUERY="1",
        TPU_WORKER_HOSTNAMES="localhost",
        ALLOW_MULTIPLE_LIBTPU_LOAD="1",
        TPU_ACCELERATOR_TYPE=topology.chip.accelerator.format(count=count),
    )


def described_devices(topology: Topology) -> list[Any]:
    """The devices of a described topology, for meshes and compiling; nothing can run on them.

    Raises:
      UserError: where libtpu knows no such topology, in its own words.
    """
    require_libtpu()
    set_environment(topology)
    import jax
    from jax.experimental import topologies

    several = {"num_slices": topology.slices} if topology.slices > 1 else {}
    try:
        described = topologies.get_topology_desc(platform="tpu", topology_name=topology.name, **several)
    except jax.errors.JaxRuntimeError as error:
        said = str(error).partition(": ")[2].partition("\n")[0]
        raise UserError("--topology is not one that libtpu knows", topology.name, f"It says: {said}") from error
    return list(described.devices)
