"""FLOPs of the matrix products in a compiled module: 2 a multiply-add, elementwise operations not counted.

The TPU compiler writes every product as a convolution. Batched products get padding and dilation, in which most kernel
taps fall on no input entry; only pairs that overlap are counted.
"""

from __future__ import annotations

import math
import re

from aimv2_jax.aot.cost_model.kernels import declared_cost
from aimv2_jax.aot.hlo import Instruction, Module
from aimv2_jax.aot.schedule import scheduled


def compiled_flops(module: Module) -> float:
    """Returns the FLOPs of all products of one step on one device; kernels count as declared."""
    counted: dict[str, float] = {}
    return sum(item.times * flops_of(item.instruction, item.computation, module, counted) for item in scheduled(module))


def flops_of(
    instruction: Instruction, computation: str, module: Module, counted: dict[str, float] | None = None
) -> float:
    """Returns the FLOPs of one instruction, with those inside a fusion; `counted` caches computations."""
    counted = {} if counted is None else counted
    if instruction.opcode == "custom-call":
        return (declared_cost(instruction) or (0.0, 0.0))[0]
    if instruction.opcode in ("convolution", "dot"):
        named = module.named(computation)
        operands = [named[name].arrays[0].dims for name in instruction.operands[:2]]
        count = _convolution if instruction.opcode == "convolution" else _dot
        return 2.0 * count(instruction, *operands)
    if not instruction.calls or instruction.calls not in module.computations:
        return 0.0
    if instruction.calls not in counted:
        inner = module.computations[instruction.calls]
        counted[instruction.calls] = sum(flops_of(line, instruction.calls, module, counted) for line in inner)
    return counted[instruction.calls]


def _dot(instruction: Instruction, left: tuple[int, ...], right: tuple[int, ...]) -> int:
    contracted = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", instruction.attributes)
    sizes = [left[int(axis)] for axis in contracted[1].split(",") if axis] if contracted else []
    return instruction.arrays[0].size * math.prod(sizes)


def _convolution(instruction: Instruction, image: tuple[int, ...], kernel: tuple[int, ...]) -> int:
    """Counts multiply-adds: batch x features out x features in of a group x overlapping pairs of positions."""
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", instruction.attributes)
    image_labels, kernel_labels, out_labels = labels.groups()
    out = instruction.arrays[0].dims
    window = re.search(r"window=\{([^}]*)\}", instruction.attributes)
    settings = dict(re.findall(r"(\w+)=(\S+)", window[1])) if window else {}
    pairs = 1
    for axis in sorted(letter for letter in out_labels if letter.isdigit()):
        number = int(axis)

        def setting(name: str, default: str, number: int = number) -> str:
            return settings[name].split("x")[number] if name in settings else default

        low = int(setting("pad", "0_0").partition("_")[0])
        pairs *= _overlapping_pairs(
            size=image[image_labels.index(axis)],
            taps=kernel[kernel_labels.index(axis)],
            positions=out[out_labels.index(axis)],
            low=low,
            stride=int(setting("stride", "1")),
            spread=int(setting("lhs_dilate", "1")),
            gap=int(setting("rhs_dilate", "1")),
        )
    batch, features = out[out_labels.index("b")], out[out_labels.index("f")]
    return batch * features * kernel[kernel_labels.index("i")] * pairs


def _overlapping_pairs(*, size: int, taps: int, positions: int, low: int, stride: int, spread: int, gap: int) -> int:
    """Counts pairs of output position and kernel tap that fall on an entry of the (dilated, padded) input."""
    count = 0
    for tap in range(taps):
        offset = tap * gap - low
        if spread == 1:  # Positions p with 0 <= p · stride + offset < size.
            first, last = -(offset // stride), (size - 1 - offset) // stride
            count += max(0, min(last, positions - 1) - max(first, 0) + 1)
        else:
            ends = (position * stride + offset for position in range(positions))
            count += sum(0 <= end <= (size - 1) * spread and end % spread == 0 for end in ends)
    return count
