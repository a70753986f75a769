"""Common names and peak FLOP/s of accelerators, by jax's `device_kind`."""

from __future__ import annotations

from typing import NamedTuple

import jax


class ChipKind(NamedTuple):
    """Common name of a chip generation, and its dense bfloat16 peak in FLOP/s (vendor data sheets)."""

    name: str
    peak_flops: float


# Keyed by prefix of `device_kind`; the longest match wins.
_KINDS = {
    "TPU v4": ChipKind("v4", 275e12),
    "TPU v5 lite": ChipKind("v5e", 197e12),
    "TPU v5": ChipKind("v5p", 459e12),
    "TPU v6 lite": ChipKind("v6e", 918e12),
    "NVIDIA A100": ChipKind("A100", 312e12),
    "NVIDIA H100": ChipKind("H100", 989e12),
    "NVIDIA H200": ChipKind("H200", 989e12),
}


def chip_kind(device: jax.Device) -> ChipKind | None:
    """Returns the kind of a device, or None if it is not a known accelerator."""
    prefixes = [prefix for prefix in _KINDS if device.device_kind.startswith(prefix)]
    return _KINDS[max(prefixes, key=len)] if prefixes else None
