"""FLOPs of the matrix products in a compiled module: 2 per multiply-add. Elementwise operations are not counted.

The TPU compiler writes every matrix product as a convolution. It adds padding and dilation to batched products, so most
kernel taps fall on padding or between input entries. Only taps that fall on an input entry are counted.
"""

from __future__ import annotations

import math
import re

import numpy as np

from aimv2_jax.aot.cost_model.kernels import declared_cost
from aimv2_jax.aot.hlo import Instruction, Module, scheduled


def compiled_flops(module: Module) -> float:
    """Returns the FLOPs of all products of one step on one device; a Pallas kernel counts its declared FLOPs."""
    cache: dict[str, float] = {}
    return sum(item.times * flops_of(item.instruction, item.computation, module, cache) for item in scheduled(module))


def flops_of(instruction: Instruction, computation: str, module: Module, cache: dict[str, float]) -> float:
    """Returns the FLOPs of one instruction, including a fusion's; `cache` holds the FLOPs of fused computations."""
    if instruction.opcode == "custom-call":
        return (declared_cost(instruction) or (0.0, 0.0))[0]
    if instruction.opcode in ("convolution", "dot"):
        named = module.named(computation)
        operands = [named[name].arrays[0].dims for name in instruction.operands[:2]]
        count = _convolution if instruction.opcode == "convolution" else _dot
        return 2.0 * count(instruction, *operands)
    if not instruction.calls or instruction.calls not in module.computations:
        return 0.0
    if instruction.calls not in cache:
        inner = module.computations[instruction.calls]
        cache[instruction.calls] = sum(flops_of(line, instruction.calls, module, cache) for line in inner)
    return cache[instruction.calls]


def _dot(instruction: Instruction, left: tuple[int, ...], right: tuple[int, ...]) -> int:
    contracted = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", instruction.attributes)
    sizes = [left[int(axis)] for axis in contracted[1].split(",") if axis] if contracted else []
    return instruction.arrays[0].size * math.prod(sizes)


def _convolution(instruction: Instruction, image: tuple[int, ...], kernel: tuple[int, ...]) -> int:
    """Counts multiply-adds: batch x output features x input features per group x overlapping pairs of positions."""
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", instruction.attributes)
    image_labels, kernel_labels, out_labels = labels.groups()
    out = instruction.arrays[0].dims
    window = re.search(r"window=\{([^}]*)\}", instruction.attributes)
    settings = {name: text.split("x") for name, text in re.findall(r"(\w+)=(\S+)", window[1] if window else "")}
    pairs = 1
    for axis in sorted(letter for letter in out_labels if letter.isdigit()):
        setting = {name: values[int(axis)] for name, values in settings.items()}
        pairs *= _overlapping_pairs(
            size=image[image_labels.index(axis)],
            taps=kernel[kernel_labels.index(axis)],
            positions=out[out_labels.index(axis)],
            pad_low=int(setting.get("pad", "0_0").partition("_")[0]),
            stride=int(setting.get("stride", 1)),
            input_dilation=int(setting.get("lhs_dilate", 1)),
            kernel_dilation=int(setting.get("rhs_dilate", 1)),
        )
    batch, features = out[out_labels.index("b")], out[out_labels.index("f")]
    return batch * features * kernel[kernel_labels.index("i")] * pairs


def _overlapping_pairs(
    *, size: int, taps: int, positions: int, pad_low: int, stride: int, input_dilation: int, kernel_dilation: int
) -> int:
    """Counts pairs of output position and kernel tap that fall on an entry of the padded and dilated input."""
    starts = np.arange(positions) * stride - pad_low
    last = (size - 1) * input_dilation
    count = 0
    for tap in range(taps):
        places = starts + tap * kernel_dilation
        count += int(((places >= 0) & (places <= last) & (places % input_dilation == 0)).sum())
    return count
