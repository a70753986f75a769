"""Described TPU topologies: devices to compile for without hardware. Only this module sets libtpu's environment."""

from __future__ import annotations

import dataclasses
import importlib.util
import math
import os
import re
from typing import Any

from aimv2_jax.checkpoint.error_text import first_line
from aimv2_jax.errors import UserError
from aimv2_jax.parallel.hardware import Chip, find_chip


@dataclasses.dataclass(frozen=True)
class Topology:
    """A slice by name ("v5e:16x16"), and the number of slices."""

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

    @property
    def num_devices(self) -> int:
        return self.num_chips * self.chip.devices

    @property
    def axes(self) -> tuple[int, ...]:
        """Sizes of the axes that a mesh can follow: the interconnect's, then a chip's devices if there are several."""
        return self.shape if self.chip.devices == 1 else (*self.shape, self.chip.devices)


def parse_topology(name: str, slices: int = 1, flag: str = "--topology") -> Topology:
    """Parses a name such as "v5e:16x16"; raises UserError, which names the flag, for an invalid one."""
    match = re.fullmatch(r"(\w+):(\d+(?:x\d+)*)", name)
    if not match or any(int(size) < 1 for size in match[2].split("x")):
        raise UserError(f"{flag} is not CHIP:SHAPE", name, "Give for example v5e:16x16, v5p:4x4x16 or v6e:16x16")
    return Topology(name, slices, find_chip(match[1], flag), tuple(int(size) for size in match[2].split("x")))


def require_libtpu() -> None:
    """Raises UserError if the TPU compiler is not installed."""
    if importlib.util.find_spec("libtpu") is None:
        raise UserError("the TPU compiler is not installed", "libtpu", "Install it with pip install -e .[tpu]")


def described_devices(topology: Topology) -> list[Any]:
    """Returns the devices of a described topology, for meshes and compilation; nothing can run on them.

    Call it before importing jax: it sets libtpu's environment, so that no TPU is searched for.

    Raises:
      UserError: if libtpu does not know the topology, with its message.
    """
    require_libtpu()
    count = topology.chips_per_slice * topology.chip.cores_counted
    os.environ.update(
        JAX_PLATFORMS="cpu",
        TPU_SKIP_MDS_QUERY="1",
        TPU_WORKER_HOSTNAMES="localhost",
        ALLOW_MULTIPLE_LIBTPU_LOAD="1",
        TPU_ACCELERATOR_TYPE=topology.chip.accelerator.format(count=count),
    )
    import jax
    from jax.experimental import topologies

    chip = topology.chip
    options: dict[str, Any] = dict(chip.libtpu_options)
    if topology.slices > 1:
        options["num_slices"] = topology.slices
    name = f"{chip.libtpu_name or chip.name}:{topology.name.partition(':')[2]}"
    try:
        described = topologies.get_topology_desc(platform="tpu", topology_name=name, **options)
    except jax.errors.JaxRuntimeError as error:
        remedy = f"libtpu reports: {first_line(error).partition(': ')[2]}"
        raise UserError("--topology is not one that libtpu knows", topology.name, remedy) from error
    return list(described.devices)
