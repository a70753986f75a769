"""What jax calls an accelerator, and what everybody else does. Only what a run asks of the chip it is on."""

from __future__ import annotations

from typing import NamedTuple

import jax


class ChipKind(NamedTuple):
    """A generation's common name, and its dense bfloat16 peak in FLOP/s (the makers' data sheets)."""

    name: str
    peak_flops: float


_KINDS = {  # By the start of jax's `device_kind`: the longest match wins.
    "TPU v4": ChipKind("v4", 275e12),
    "TPU v5 lite": ChipKind("v5e", 197e12),
    "TPU v5": ChipKind("v5p", 459e12),
    "TPU v6 lite": ChipKind("v6e", 918e12),
    "NVIDIA A100": ChipKind("A100", 312e12),
    "NVIDIA H100": ChipKind("H100", 989e12),
    "NVIDIA H200": ChipKind("H200", 989e12),
}


def chip_kind(device: jax.Device) -> ChipKind | None:
    """None where the device is no accelerator that is known here."""
    known = [start for start in _KINDS if device.device_kind.startswith(start)]
    return _KINDS[max(known, key=len)] if known else None
