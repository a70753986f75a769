"""Accelerators: names, peaks, memory and links, with their sources. Runs and predictions read the same table.

Everything is counted by device, as jax counts: a chip of v4 and v5p is one device with two cores, a chip of v7x is two.

Sources: "doc" is the vendor's public documentation: Google Cloud's pages of that TPU generation (docs.cloud.google.com,
tpu/docs/v4, v5e, v5p, v6e and tpu7x, read in 2026), or a GPU's data sheet; "jax" is the table of chips in jax 0.12
(`jax/_src/tpu_info.py`); "compiler" is libtpu 0.0.52 (its HBM limit, its estimates); any other is named.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

from aimv2_jax.errors import UserError

if TYPE_CHECKING:
    import jax


@dataclasses.dataclass(frozen=True)
class ChipKind:
    """A generation of chips."""

    name: str  # For a TPU the prefix of topology names: "v5e" in "v5e:16x16".
    device_kinds: tuple[str, ...]  # jax's `device_kind`: the whole name for a TPU, its beginning for a GPU.
    peak_flops: float  # Dense bfloat16, per second and device.

    def describes(self, device_kind: str) -> bool:
        """Whether a device with this `device_kind` is of this generation."""
        return device_kind.startswith(self.device_kinds)


@dataclasses.dataclass(frozen=True)
class Chip(ChipKind):
    """A TPU generation that steps can be compiled for. Rates are per second and device, sizes in bytes."""

    accelerator: str  # Pattern of TPU_ACCELERATOR_TYPE; {count} is chips x `cores_counted`.
    cores_counted: int  # Units that {count} has per chip: some generations count cores, others chips.
    clock_hz: float  # Clock of the compiler's estimated cycles.
    hbm_bytes_per_s: float
    hbm_limit_bytes: int  # The compiler's limit for one program.
    vmem_bytes: int  # Per core.
    torus_axes: int
    link_bytes_per_s: float  # Per interconnect link and direction, of a chip.
    ring_size: int  # A torus axis whose size is a multiple of this has wrap-around links; other axes are lines.
    dcn_bytes_per_s: float  # Data-centre network between slices: the device's share of its host, per direction.
    devices: int = 1  # Devices of a chip.
    die_bytes_per_s: float = 0.0  # Between the two devices of a chip, per direction.
    libtpu_name: str = ""  # Prefix of libtpu's topology names, where it is another than `name`.
    libtpu_options: tuple[tuple[str, str], ...] = ()  # What libtpu needs beside the name to describe a topology.

    @property
    def flops_per_cycle(self) -> float:
        """Peak bfloat16 FLOPs of a device per clock cycle."""
        return self.peak_flops / self.clock_hz

    def describes(self, device_kind: str) -> bool:
        """Whether a device with this `device_kind` is of this generation."""
        return device_kind in self.device_kinds


_GIB = 2**30
_MIB = 2**20

_KINDS = (
    Chip(
        name="v4",
        device_kinds=("TPU v4",),
        accelerator="v4-{count}",
        cores_counted=2,
        # 275 TFLOP/s (doc) at 8 matrix units of 128 x 128, 262144 FLOPs a cycle, give 1.05 GHz.
        peak_flops=262144 * 1.05e9,
        clock_hz=1.05e9,
        hbm_bytes_per_s=1200e9,  # doc
        hbm_limit_bytes=int(30.0 * _GIB),  # compiler: 30 and a fraction, of 32 GiB (doc)
        vmem_bytes=16 * _MIB,  # jax
        torus_axes=3,
        # doc: 1.1 PB/s of all-reduce a pod of 4096 over 6 links a chip; by the same measure v5e's links have 50 GB/s
        # and v6e's 100. Google DeepMind, "How to Scale Your Model", has 45 GB/s too.
        link_bytes_per_s=45e9,
        ring_size=4,  # doc: slices of 4 x 4 x 4 and larger are full tori
        dcn_bytes_per_s=50e9 / 8,  # the same book: 6.25 GB/s a chip
        libtpu_options=(("chip_config_name", "megacore"),),  # Both cores of a chip are one device, as on Cloud TPUs.
    ),
    Chip(
        name="v5e",
        device_kinds=("TPU v5 lite", "TPU v5e"),
        accelerator="v5litepod-{count}",
        cores_counted=1,
        # 197 TFLOP/s (doc, and compiler) at 4 matrix units of 128 x 128, 131072 FLOPs a cycle, give 1.50 GHz.
        peak_flops=131072 * 1.5e9,
        clock_hz=1.5e9,
        hbm_bytes_per_s=819e9,  # doc
        hbm_limit_bytes=int(15.75 * _GIB),  # compiler, of 16 GB (doc)
        vmem_bytes=128 * _MIB,  # jax
        torus_axes=2,
        link_bytes_per_s=50e9,  # doc: 400 GB/s a chip, both directions, over 4 links
        ring_size=16,  # doc: only the full 16 x 16 pod has wrap-around links
        dcn_bytes_per_s=6.4e12 / 8 / 256,  # doc: 6.4 Tbit/s a pod of 256
    ),
    Chip(
        name="v5p",
        device_kinds=("TPU v5", "TPU v5p"),
        accelerator="v5p-{count}",
        cores_counted=2,
        # 459 TFLOP/s (doc) at 8 matrix units of 128 x 128, 262144 FLOPs a cycle, give 1.75 GHz.
        peak_flops=262144 * 1.75e9,
        clock_hz=1.75e9,
        hbm_bytes_per_s=2765e9,  # doc
        hbm_limit_bytes=int(95.73 * _GIB),  # compiler; doc: 95 GiB of 96
        vmem_bytes=64 * _MIB,  # jax
        torus_axes=3,
        link_bytes_per_s=100e9,  # doc: 1200 GB/s a chip, both directions, over 6 links
        ring_size=4,  # doc: slices of 4 x 4 x 4 and larger are full tori
        dcn_bytes_per_s=50e9 / 8,  # doc: 50 Gbit/s a chip
    ),
    Chip(
        name="v6e",
        device_kinds=("TPU v6 lite", "TPU v6e"),
        accelerator="v6e-{count}",
        cores_counted=1,
        # 918 TFLOP/s (doc). The clock is inferred: the compiler's best matmul does 408750 FLOPs in one of its cycles,
        # so its peak is assumed to be the next power of two, 524288, which gives 1.75 GHz.
        peak_flops=524288 * 1.75e9,
        clock_hz=1.75e9,
        hbm_bytes_per_s=1640e9,  # doc
        hbm_limit_bytes=int(31.24 * _GIB),  # compiler, of 32 GB (doc)
        vmem_bytes=128 * _MIB,  # jax
        torus_axes=2,
        link_bytes_per_s=100e9,  # doc: twice v5e's (3200 Gbit/s a chip against 1600), over 4 links
        ring_size=16,  # as v5e
        dcn_bytes_per_s=25.6e12 / 8 / 256,  # doc: 25.6 Tbit/s a pod of 256
    ),
    Chip(
        name="v7x",
        device_kinds=("TPU7x",),
        accelerator="tpu7x-{count}",
        cores_counted=2,
        # 2307 TFLOP/s a chip (doc), 1153.5 a device. The clock is inferred from v6e's 524288 FLOPs a cycle: 2.2 GHz.
        peak_flops=524288 * 2.2e9,
        clock_hz=2.2e9,
        hbm_bytes_per_s=7380e9 / 2,  # doc: 7380 GB/s a chip
        hbm_limit_bytes=int(94.0 * _GIB),  # compiler: 94 and a fraction; doc: 192 GiB a chip
        vmem_bytes=64 * _MIB,  # jax
        torus_axes=3,
        link_bytes_per_s=100e9,  # doc: 1200 GB/s a chip, both directions, over 6 links
        ring_size=4,  # as v5p
        dcn_bytes_per_s=100e9 / 8 / 2,  # doc: 100 Gbit/s a chip
        devices=2,
        die_bytes_per_s=6 * 100e9,  # six links, as a report quotes Google; not seen in its documentation
        libtpu_name="tpu7x",
    ),
    ChipKind("A100", ("NVIDIA A100",), 312e12),  # doc, as the next two
    ChipKind("H100", ("NVIDIA H100",), 989e12),
    ChipKind("H200", ("NVIDIA H200",), 989e12),
)
CHIPS = {kind.name: kind for kind in _KINDS if isinstance(kind, Chip)}


def chip_kind(device: jax.Device) -> ChipKind | None:
    """Returns the kind of a device, or None if the table does not have it: a run then goes on without MFU."""
    return next((kind for kind in _KINDS if kind.describes(device.device_kind)), None)


def find_chip(name: str, flag: str = "--topology") -> Chip:
    """Returns the chip of a generation; raises UserError, which names the flag, for a name without an entry."""
    if name not in CHIPS:
        remedy = f"Use one of {', '.join(CHIPS)}, as in v5e:16x16; a prediction needs a chip's peak, memory and links"
        raise UserError(f"{flag} names an unknown chip", name, remedy)
    return CHIPS[name]
