"""Parameter name table for both directions: ours, Hugging Face's, and those of Apple's released files.

Ours are paths in {"encoder": …, "head": …}; leaves of blocks are stacked over layers, which the others number as {i}.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any, Literal, NamedTuple

import einops
import numpy as np

Naming = Literal["hf", "apple"]
Array = np.ndarray


class TensorLayout(NamedTuple):
    """Conversion of a tensor between the external layout and ours."""

    to_ours: Callable[[Array], Array]
    to_theirs: Callable[[Array], Array]


def _patch_matrix(conv: Array) -> Array:
    return einops.rearrange(conv, "d c h w -> (h w c) d")


def _patch_conv(matrix: Array) -> Array:
    side = round((matrix.shape[0] / 3) ** 0.5)
    return einops.rearrange(matrix, "(h w c) d -> d c h w", h=side, w=side)


SAME = TensorLayout(lambda x: x, lambda x: x)
MATRIX = TensorLayout(lambda x: x.T, lambda x: x.T)  # Externally [out, in].
PATCHES = TensorLayout(_patch_matrix, _patch_conv)  # Externally a convolution's [out, RGB, row, column].
TABLE = TensorLayout(lambda x: x.reshape(x.shape[-2:]), lambda x: x)  # Apple has a leading axis of 1.
QUERY = TensorLayout(lambda x: x.reshape(-1), lambda x: x.reshape(1, 1, -1))


@dataclasses.dataclass(frozen=True)
class ParamName:
    """One of our tensors. `part` is its index in a matrix that Apple fuses along the first axis, [q; k; v], or None."""

    ours: str
    hf: str
    apple: str
    layout: TensorLayout
    part: int | None = None

    def name_in(self, naming: Naming) -> str:
        return self.hf if naming == "hf" else self.apple

    @property
    def stacked(self) -> bool:
        return "{i}" in self.hf


NUM_FUSED = 3  # Query, key and value in one matrix.


def _block(ours: str, hf: str, apple: str, layout: TensorLayout, part: int | None = None) -> ParamName:
    return ParamName(
        f"encoder/trunk/blocks/{ours}", f"encoder.layers.{{i}}.{hf}.weight", f"trunk.blocks.{{i}}.{apple}.weight",
        layout, part,
    )  # fmt: skip


_CONV = "preprocessor.patchifier"
NAMES: tuple[ParamName, ...] = (
    ParamName("encoder/patch_embed/kernel", "embeddings.patch_embed.weight", f"{_CONV}.proj.weight", PATCHES),
    ParamName("encoder/patch_embed/bias", "embeddings.patch_embed.bias", f"{_CONV}.proj.bias", SAME),
    ParamName("encoder/patch_norm/scale", "embeddings.rms_norm.weight", f"{_CONV}.norm.weight", SAME),
    ParamName("encoder/position", "embeddings.position_embedding.weight", "preprocessor.pos_embed", TABLE),
    _block("norm_1/scale", "rms_norm1", "norm_1", SAME),
    _block("attention/query/kernel", "attention.q_proj", "attn.qkv", MATRIX, 0),
    _block("attention/key/kernel", "attention.k_proj", "attn.qkv", MATRIX, 1),
    _block("attention/value/kernel", "attention.v_proj", "attn.qkv", MATRIX, 2),
    _block("attention/out/kernel", "attention.out_proj", "attn.proj", MATRIX),
    _block("norm_2/scale", "rms_norm2", "norm_2", SAME),
    _block("mlp/gate/kernel", "ffn.gate_proj", "mlp.fc1", MATRIX),
    _block("mlp/up/kernel", "ffn.up_proj", "mlp.fc3", MATRIX),
    _block("mlp/down/kernel", "ffn.down_proj", "mlp.fc2", MATRIX),
    ParamName("encoder/trunk/norm/scale", "rms_norm.weight", "trunk.post_trunk_norm.weight", SAME),
    ParamName("head/pool/query", "head.cls_token", "head.cls_token", QUERY),
    ParamName("head/pool/key/kernel", "head.k_proj.weight", "head.k.weight", MATRIX),
    ParamName("head/pool/value/kernel", "head.v_proj.weight", "head.v.weight", MATRIX),
    ParamName("head/output/kernel", "head.output_proj.weight", "head.linear.weight", MATRIX),
    ParamName("head/output/bias", "head.output_proj.bias", "head.linear.bias", SAME),
)
POSITION = "encoder/position"


def expected(naming: Naming, shapes: Mapping[str, tuple[int, ...]], depth: int) -> dict[str, tuple[int, ...]]:
    """External name and shape of every tensor, from the shapes of ours (`{path: shape}`)."""
    external: dict[str, tuple[int, ...]] = {}
    for name in NAMES:
        if name.ours not in shapes:
            continue
        ours = shapes[name.ours][1:] if name.stacked else shapes[name.ours]
        theirs = name.layout.to_theirs(np.broadcast_to(np.float32(0), ours)).shape
        if naming == "apple":
            theirs = (1, *theirs) if name.layout is TABLE else theirs
            theirs = (NUM_FUSED * theirs[0], *theirs[1:]) if name.part is not None else theirs
        for layer in range(depth) if name.stacked else (None,):
            external[name.name_in(naming).format(i=layer)] = tuple(theirs)
    return external


def to_ours(
    read: Callable[[str], Array], naming: Naming, paths: Collection[str], depth: int
) -> Iterator[tuple[str, Array]]:
    """Yields (path, array) of our `paths`, blocks stacked; `read` returns a tensor by its external name."""
    for name in NAMES:
        if name.ours not in paths:
            continue

        def convert(external: str, name: ParamName = name) -> Array:
            tensor = read(external)
            if naming == "apple" and name.part is not None:
                rows = tensor.shape[0] // NUM_FUSED
                tensor = tensor[name.part * rows : (name.part + 1) * rows]
            return name.layout.to_ours(tensor)

        external = name.name_in(naming)
        if name.stacked:
            yield name.ours, np.stack([convert(external.format(i=layer)) for layer in range(depth)])
        else:
            yield name.ours, np.ascontiguousarray(convert(external))


def to_hf(tree: Mapping[str, Array]) -> Iterator[tuple[str, Array]]:
    """Yields (name, tensor) in Hugging Face's naming from our `{path: array}`."""
    for name in NAMES:
        if name.ours not in tree:
            continue
        leaf = tree[name.ours]
        slices = [(name.hf.format(i=i), leaf[i]) for i in range(len(leaf))] if name.stacked else [(name.hf, leaf)]
        for external, tensor in slices:
            yield external, np.ascontiguousarray(name.layout.to_theirs(np.asarray(tensor)))


def depth_of(tensors: Mapping[str, Any], naming: Naming) -> int:
    """Number of layers, from the numbered names among `tensors`."""
    stem = "encoder.layers" if naming == "hf" else "trunk.blocks"
    numbers = [int(match[1]) for name in tensors if (match := re.match(rf"{re.escape(stem)}\.(\d+)\.", name))]
    return max(numbers, default=-1) + 1
