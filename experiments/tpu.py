"""What each TPU generation runs the pre-training with: topology, mesh, recomputation and compiler options.

An experiment takes them by name, `pretrain.py:large,v6e`; `python -m experiments.tpu` prints the run and the topology
of each, for launch/aot_check.sh. `python -m aimv2_jax.aot --choose` looks for better ones, or for other slices.

The batch is always 8192, so a topology also decides the images of a device. The rules behind the values [O]:
- All images of a device in one pass: gradients are reduced in every pass of an accumulation.
- Where memory has room (v5p, v7x, v4), more than 32 images: gradients and weights travel once a step, however many.
  Not on v6e, whose memory is slow for its peak: with 32 images of L, activations fit its 128 MiB of VMEM; with 128,
  computing alone falls from 0.463 to 0.350 of peak (LOG.md).
- `fsdp` over all axes of a small slice where a device keeps 8 rows of a matrix or more (a tile of float32): a
  reduce-scatter over all links moves half of an all-reduce's bytes, at the rate of all rings.
Only the values of v5e, and L on v6e, have been compiled; the others are what launch/aot_check.sh is to confirm.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from ml_collections import ConfigDict


@dataclasses.dataclass(frozen=True)
class Defaults:
    """How a size runs on a generation.

    Attributes:
      topology: the slice, as `python -m aimv2_jax.aot --topology` names it.
      fsdp: devices that split parameters and moments; the others of the slice are `mesh.data`.
      remat: what blocks recompute, of the encoder and, if another, of the decoder.
      options: compiler options of this generation, besides those of `base.py` and in their place.
    """

    topology: str
    fsdp: int
    remat: str = "none"
    decoder_remat: str | None = None
    options: Mapping[str, str] = dataclasses.field(default_factory=dict)


# A v4 has 16 MiB of VMEM a core: the 64 MiB that matrix products may use elsewhere do not exist there.
_V4 = {"xla_tpu_scoped_vmem_limit_kib": "16384"}
# Weights that are gathered twice overlap with the same matmuls as gradients. Only where blocks are computed again:
# libtpu 0.0.52 crashes with this option if the attention weights are not kept.
_RECOMPUTED = {"xla_tpu_async_collective_fusion_fuse_multiple_collectives": "true"}

CHIPS: dict[str, dict[str, Defaults]] = {
    # 32 GiB: 64 images of base to huge, 32 of the larger ones.
    "v4": {
        "base": Defaults("v4:4x4x8", fsdp=1, options=_V4),
        "large": Defaults("v4:4x4x8", fsdp=32, options=_V4),
        "huge": Defaults("v4:4x4x8", fsdp=32, options=_V4),
        "1b": Defaults("v4:4x8x8", fsdp=64, options=_V4),
        "3b": Defaults("v4:4x8x8", fsdp=64, options=_V4),
    },
    # 16 GiB: 32 images; the values of `pretrain.py` itself, whose figures are in results/aot.md.
    "v5e": {
        "base": Defaults("v5e:16x16", fsdp=1),
        "large": Defaults("v5e:16x16", fsdp=16),
        "huge": Defaults("v5e:16x16", fsdp=16),
        "1b": Defaults("v5e:16x16", fsdp=16, remat="matmuls", options=_RECOMPUTED),
        "3b": Defaults("v5e:16x16", fsdp=16, remat="gate", decoder_remat="full", options=_RECOMPUTED),
    },
    # 95 GiB: 128 images of any size.
    "v5p": {
        "base": Defaults("v5p:4x4x4", fsdp=1),
        "large": Defaults("v5p:4x4x4", fsdp=64),
        "huge": Defaults("v5p:4x4x4", fsdp=64),
        "1b": Defaults("v5p:4x4x4", fsdp=64),
        "3b": Defaults("v5p:4x4x4", fsdp=64),
    },
    # 32 GiB, but 32 images of any size: see above.
    "v6e": {
        "base": Defaults("v6e:16x16", fsdp=1),
        "large": Defaults("v6e:16x16", fsdp=16),
        "huge": Defaults("v6e:16x16", fsdp=16),
        "1b": Defaults("v6e:16x16", fsdp=16),
        "3b": Defaults("v6e:16x16", fsdp=16),
    },
    # 96 GiB a device, two devices a chip: 64 images of any size.
    "v7x": {
        "base": Defaults("v7x:4x4x4", fsdp=1),
        "large": Defaults("v7x:4x4x4", fsdp=32),
        "huge": Defaults("v7x:4x4x4", fsdp=32),
        "1b": Defaults("v7x:4x4x4", fsdp=32),
        "3b": Defaults("v7x:4x4x4", fsdp=32),
    },
}


def with_chips(runs: tuple[str, ...]) -> tuple[str, ...]:
    """Returns the runs, and after them each run on each generation: RUN,CHIP."""
    return (*runs, *(f"{run},{chip}" for chip in CHIPS for run in runs))


def use_chip(config: ConfigDict, size: str, chip: str) -> None:
    """Sets mesh, recomputation and compiler options of a run of `size` to the defaults of a generation."""
    defaults = CHIPS[chip][size]
    config.mesh.fsdp = defaults.fsdp
    config.model.remat = defaults.remat
    config.model.decoder.remat = defaults.decoder_remat
    options = config.train.tpu_compiler_options
    if defaults.options and chip not in options:
        options[chip] = ConfigDict()
    for name, value in defaults.options.items():
        options[chip][name] = value


if __name__ == "__main__":
    for chip, sizes in CHIPS.items():
        for size, defaults in sizes.items():
            print(f"{size},{chip} {defaults.topology}")
