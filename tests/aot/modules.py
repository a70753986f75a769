"""Short modules as the TPU compiler writes them, by hand, and a network of sixteen chips to read them on."""

from __future__ import annotations

import math

import numpy as np

from aimv2_jax.aot.chips import CHIPS
from aimv2_jax.aot.collectives import Collectives
from aimv2_jax.aot.hlo import Module, parse_module
from aimv2_jax.aot.interconnect import Layout

# 1 Mcycle is 1 ms on this clock, and a link carries 1 MB in 1 ms: sums can be done in the head.
CHIP = CHIPS["v5e"].__class__(
    **{
        **{name: getattr(CHIPS["v5e"], name) for name in CHIPS["v5e"].__dataclass_fields__},
        "clock_hz": 1e9,
        "link_bytes_per_s": 1e9,
        "dcn_bytes_per_s": 1e8,
        "ring_size": 4,
    }
)


def square(side: int = 4, ring_size: int = 4, num_slices: int = 1) -> Layout:
    """Mesh data x fsdp over a side x side torus, a mesh axis along each torus axis."""
    chip = CHIP.__class__(**{**{n: getattr(CHIP, n) for n in CHIP.__dataclass_fields__}, "ring_size": ring_size})
    coords = np.array([(x, y) for x in range(side) for y in range(side)])
    return Layout(("data", "fsdp", "tensor"), (side, side, 1), coords, (side, side), num_slices, chip)


def row_groups(side: int = 4) -> str:
    """The groups of the fsdp axis of `square`, as lists."""
    rows = [",".join(str(row * side + column) for column in range(side)) for row in range(side)]
    return "{" + ",".join("{" + row + "}" for row in rows) + "}"


def compute(name: str, operand: str, cycles: int) -> str:
    """A fusion with an estimate, of 1024 floats."""
    config = f'{{"window_config":{{"estimated_cycles":"{cycles}"}}}}'
    return f"  %{name} = f32[1024]{{0}} fusion(%{operand}), kind=kLoop, calls=%double, backend_config={config}"


DOUBLE = """\
%double (p: f32[1024]) -> f32[1024] {
  %p = f32[1024]{0} parameter(0)
  ROOT %add = f32[1024]{0} add(%p, %p)
}
"""


def module(body: str, before: str = "") -> Module:
    """An entry computation around `body`, whose argument is %x: f32[1024]."""
    head = "ENTRY %main (x: f32[1024]) -> f32[1024] {\n  %x = f32[1024]{0} parameter(0)\n"
    return parse_module(f"HloModule jit_step\n\n{DOUBLE}\n{before}\n{head}{body}\n}}\n")


def collectives(parsed: Module, layout: Layout | None = None) -> Collectives:
    return Collectives(parsed, layout or square())


def milliseconds(num_bytes: float, links: int) -> float:
    """Of the all-gather of so many bytes over four devices, at 1 GB/s a link."""
    return math.fsum([num_bytes * 3 / 4 / (links * 1e9) * 1e3])
