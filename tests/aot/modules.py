"""Small hand-written modules in the TPU compiler's format, and a layout of sixteen chips."""

from __future__ import annotations

import math

import numpy as np

from aimv2_jax.aot.collectives import Collectives
from aimv2_jax.aot.hlo import Module, parse_module
from aimv2_jax.aot.interconnect import Layout
from aimv2_jax.parallel.hardware import CHIPS

# Round figures for mental arithmetic: 1 Mcycle takes 1 ms, and a link carries 1 MB in 1 ms.
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
    """Returns the layout of a data x fsdp mesh on a side x side torus, one mesh axis along each torus axis."""
    chip = CHIP.__class__(**{**{n: getattr(CHIP, n) for n in CHIP.__dataclass_fields__}, "ring_size": ring_size})
    coords = np.array([(x, y) for x in range(side) for y in range(side)])
    return Layout(("data", "fsdp", "tensor"), (side, side, 1), coords, (side, side), num_slices, chip)


def row_groups(side: int = 4) -> str:
    """Returns the replica groups of the fsdp axis of `square`, as lists."""
    rows = [",".join(str(row * side + column) for column in range(side)) for row in range(side)]
    return "{" + ",".join("{" + row + "}" for row in rows) + "}"


def compute(name: str, operand: str, cycles: int) -> str:
    """Returns a fusion over 1024 floats with a cycle estimate."""
    config = f'{{"window_config":{{"estimated_cycles":"{cycles}"}}}}'
    return f"  %{name} = f32[1024]{{0}} fusion(%{operand}), kind=kLoop, calls=%double, backend_config={config}"


DOUBLE = """\
%double (p: f32[1024]) -> f32[1024] {
  %p = f32[1024]{0} parameter(0)
  ROOT %add = f32[1024]{0} add(%p, %p)
}
"""


def module(body: str, before: str = "") -> Module:
    """Parses an entry computation around `body` with the argument %x: f32[1024]."""
    head = "ENTRY %main (x: f32[1024]) -> f32[1024] {\n  %x = f32[1024]{0} parameter(0)\n"
    return parse_module(f"HloModule jit_step\n\n{DOUBLE}\n{before}\n{head}{body}\n}}\n")


def collectives(parsed: Module, layout: Layout | None = None) -> Collectives:
    return Collectives(parsed, layout or square())


def milliseconds(num_bytes: float, links: int) -> float:
    """Returns the time of an all-gather of `num_bytes` over four devices, at 1 GB/s a link."""
    return math.fsum([num_bytes * 3 / 4 / (links * 1e9) * 1e3])
