"""Accelerators: names, peaks, memory and links, with their sources.

Sources: "doc" is the vendor's public documentation, Google Cloud's of that TPU generation (system architecture, read in
2026) or a GPU's data sheet; "compiler" is libtpu (its HBM limit, its estimates); any other is named beside the number.
"""

from __future__ import annotations

import dataclasses

import jax

from aimv2_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class ChipKind:
    """A generation of chips."""

    name: str  # For a TPU the prefix of topology names: "v5e" in "v5e:16x16".
    device_kind: str  # Prefix of jax's `device_kind`.
    peak_flops: float  # Dense bfloat16, per second.


@dataclasses.dataclass(frozen=True)
class Chip(ChipKind):
    """A TPU generation that steps can be compiled for. Rates are per second and chip, sizes in bytes."""

    accelerator: str  # Pattern of TPU_ACCELERATOR_TYPE; {count} is chips x `cores_counted`.
    cores_counted: int  # Units that {count} has per chip: v5p counts its two cores, the others chips.
    clock_hz: float  # Clock of the compiler's estimated cycles.
    hbm_bytes_per_s: float
    hbm_limit_bytes: int  # The compiler's limit for one program.
    link_bytes_per_s: float  # Per interconnect link and direction.
    ring_size: int  # A torus axis whose size is a multiple of this has wrap-around links; other axes are lines.
    dcn_bytes_per_s: float  # Data-centre network between slices: the chip's share of its host, per direction.

    @property
    def flops_per_cycle(self) -> float:
        """Peak bfloat16 FLOPs per clock cycle."""
        return self.peak_flops / self.clock_hz


_GIB = 2**30

_KINDS = (
    ChipKind("v4", "TPU v4", 275e12),  # doc
    Chip(
        name="v5e",
        device_kind="TPU v5 lite",
        accelerator="v5litepod-{count}",
        cores_counted=1,
        # 197 TFLOP/s (doc, and compiler) at 4 matrix units of 128 x 128, 131072 FLOPs a cycle, give 1.50 GHz.
        peak_flops=131072 * 1.5e9,
        clock_hz=1.5e9,
        hbm_bytes_per_s=819e9,  # doc
        hbm_limit_bytes=int(15.75 * _GIB),  # compiler, of 16 GB (doc)
        link_bytes_per_s=50e9,  # doc: 400 GB/s a chip, both directions, over 4 links
        ring_size=16,  # doc: only the full 16 x 16 pod has wrap-around links
        dcn_bytes_per_s=6.4e12 / 8 / 256,  # doc: 6.4 Tbit/s a pod of 256
    ),
    Chip(
        name="v5p",
        device_kind="TPU v5",
        accelerator="v5p-{count}",
        cores_counted=2,
        # 459 TFLOP/s (doc) at 8 matrix units of 128 x 128, 262144 FLOPs a cycle, give 1.75 GHz.
        peak_flops=262144 * 1.75e9,
        clock_hz=1.75e9,
        hbm_bytes_per_s=2765e9,  # doc
        hbm_limit_bytes=int(95.73 * _GIB),  # compiler; doc: 95 GiB of 96
        link_bytes_per_s=100e9,  # doc: 1200 GB/s a chip, both directions, over 6 links
        ring_size=4,  # doc: slices of 4 x 4 x 4 and larger are full tori
        dcn_bytes_per_s=50e9 / 8,  # doc: 50 Gbit/s a chip
    ),
    Chip(
        name="v6e",
        device_kind="TPU v6 lite",
        accelerator="v6e-{count}",
        cores_counted=1,
        # 918 TFLOP/s (doc). The clock is inferred: the compiler's best matmul does 408750 FLOPs in one of its cycles,
        # so its peak is assumed to be the next power of two, 524288, which gives 1.75 GHz.
        peak_flops=524288 * 1.75e9,
        clock_hz=1.75e9,
        hbm_bytes_per_s=1640e9,  # doc
        hbm_limit_bytes=int(31.24 * _GIB),  # compiler, of 32 GB (doc)
        link_bytes_per_s=100e9,  # doc: twice v5e's (3200 Gbit/s a chip against 1600), over 4 links
        ring_size=16,  # as v5e
        dcn_bytes_per_s=25.6e12 / 8 / 256,  # doc: 25.6 Tbit/s a pod of 256
    ),
    ChipKind("A100", "NVIDIA A100", 312e12),  # doc, as the next two
    ChipKind("H100", "NVIDIA H100", 989e12),
    ChipKind("H200", "NVIDIA H200", 989e12),
)
CHIPS = {kind.name: kind for kind in _KINDS if isinstance(kind, Chip)}


def chip_kind(device: jax.Device) -> ChipKind | None:
    """Returns the kind of a device, or None if it is not a known accelerator. The longest matching prefix wins."""
    kinds = [kind for kind in _KINDS if device.device_kind.startswith(kind.device_kind)]
    return max(kinds, key=lambda kind: len(kind.device_kind), default=None)


def find_chip(name: str) -> Chip:
    """Returns the chip of a generation; raises UserError for a name without an entry."""
    if name not in CHIPS:
        raise UserError("--topology names an unknown chip", name, f"Use one of {', '.join(CHIPS)}, as in v5e:16x16")
    return CHIPS[name]
