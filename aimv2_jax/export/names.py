"""One table of parameter names, read both ways: ours, Hugging Face's, and those that Apple released.

Ours are paths in {"encoder": …, "head": …}; leaves of blocks are stacked over layers, which the others number: {i}.
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


class Layout(NamedTuple):
    """How a tensor lies there and here."""

    to_ours: Callable[[Array], Array]
    to_theirs: Callable[[Array], Array]


def _patch_matrix(conv: Array) -> Array:
    return einops.rearrange(conv, "d c h w -> (h w c) d")


def _patch_conv(matrix: Array) -> Array:
    side = round((matrix.shape[0] / 3) ** 0.5)
    return einops.rearrange(matrix, "(h w c) d -> d c h w", h=side, w=side)


SAME = Layout(lambda x: x, lambda x: x)
MATRIX = Layout(lambda x: x.T, lambda x: x.T)  # [out, in] there.
PATCHES = Layout(_patch_matrix, _patch_conv)  # A convolution's [out, RGB, row, column] there.
TABLE = Layout(lambda x: x.reshape(x.shape[-2:]), lambda x: x)  # Apple has a leading axis of 1.
QUERY = Layout(lambda x: x.reshape(-1), lambda x: x.reshape(1, 1, -1))


@dataclasses.dataclass(frozen=True)
class Name:
    """One tensor of ours. `part` counts those that Apple keeps as one, [q; k; v] along the first axis, else None."""

    ours: str
    hf: str
    apple: str
    layout: Layout
    part: int | None = None

    def in_(self, naming: Naming) -> str:
        return self.hf if naming == "hf" else self.apple

    @property
    def stacked(self) -> bool:
        return "{i}" in self.hf


PARTS = 3  # Of a fused matrix.


def _block(ours: str, hf: str, apple: str, layout: Layout, part: int | None = None) -> Name:
    return Name(
        f"encoder/trunk/blocks/{ours}", f"encoder.layers.{{i}}.{hf}.weight", f"trunk.blocks.{{i}}.{apple}.weight",
        layout, part,
    )  # fmt: skip


_CONV = "preprocessor.patchifier"
NAMES: tuple[Name, ...] = (
    Name("encoder/patch_embed/kernel", "embeddings.patch_embed.weight", f"{_CONV}.proj.weight", PATCHES),
    Name("encoder/patch_embed/bias", "embeddings.patch_embed.bias", f"{_CONV}.proj.bias", SAME),
    Name("encoder/patch_norm/scale", "embeddings.rms_norm.weight", f"{_CONV}.norm.weight", SAME),
    Name("encoder/position", "embeddings.position_embedding.weight", "preprocessor.pos_embed", TABLE),
    _block("norm_1/scale", "rms_norm1", "norm_1", SAME),
    _block("attention/query/kernel", "attention.q_proj", "attn.qkv", MATRIX, 0),
    _block("attention/key/kernel", "attention.k_proj", "attn.qkv", MATRIX, 1),
    _block("attention/value/kernel", "attention.v_proj", "attn.qkv", MATRIX, 2),
    _block("attention/out/kernel", "attention.out_proj", "attn.proj", MATRIX),
    _block("norm_2/scale", "rms_norm2", "norm_2", SAME),
    _block("mlp/gate/kernel", "ffn.gate_proj", "mlp.fc1", MATRIX),
    _block("mlp/up/kernel", "ffn.up_proj", "mlp.fc3", MATRIX),
    _block("mlp/down/kernel", "ffn.down_proj", "mlp.fc2", MATRIX),
    Name("encoder/trunk/norm/scale", "rms_norm.weight", "trunk.post_trunk_norm.weight", SAME),
    Name("head/pool/query", "head.cls_token", "head.cls_token", QUERY),
    Name("head/pool/key/kernel", "head.k_proj.weight", "head.k.weight", MATRIX),
    Name("head/pool/value/kernel", "head.v_proj.weight", "head.v.weight", MATRIX),
    Name("head/output/kernel", "head.output_proj.weight", "head.linear.weight", MATRIX),
    Name("head/output/bias", "head.output_proj.bias", "head.linear.bias", SAME),
)
POSITION = "encoder/position"


def names_of(position: bool, head: bool) -> tuple[Name, ...]:
    """Those of a model with or without a table of positions, and a head."""
    return tuple(
        name for name in NAMES if (position or name.ours != POSITION) and (head or not name.ours.startswith("head/"))
    )


def expected(naming: Naming, shapes: Mapping[str, tuple[int, ...]], depth: int) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor there, from the shapes of ours (`{path: shape}`)."""
    found: dict[str, tuple[int, ...]] = {}
    for name in NAMES:
        if name.ours not in shapes:
            continue
        ours = shapes[name.ours][1:] if name.stacked else shapes[name.ours]
        theirs = name.layout.to_theirs(np.broadcast_to(np.float32(0), ours)).shape
        if naming == "apple":
            theirs = (1, *theirs) if name.layout is TABLE else theirs
            theirs = (PARTS * theirs[0], *theirs[1:]) if name.part is not None else theirs
        for layer in range(depth) if name.stacked else (None,):
            found[name.in_(naming).format(i=layer)] = tuple(theirs)
    return found


def to_ours(
    read: Callable[[str], Array], naming: Naming, paths: Collection[str], depth: int
) -> Iterator[tuple[str, Array]]:
    """(path, array) of each of our `paths`, blocks stacked, from a function that reads a tensor by its name there."""
    for name in NAMES:
        if name.ours not in paths:
            continue

        def take(there: str, name: Name = name) -> Array:
            tensor = read(there)
            if naming == "apple" and name.part is not None:
                rows = tensor.shape[0] // PARTS
                tensor = tensor[name.part * rows : (name.part + 1) * rows]
            return name.layout.to_ours(tensor)

        there = name.in_(naming)
        if name.stacked:
            yield name.ours, np.stack([take(there.format(i=layer)) for layer in range(depth)])
        else:
            yield name.ours, np.ascontiguousarray(take(there))


def to_hf(tree: Mapping[str, Array]) -> Iterator[tuple[str, Array]]:
    """(name, tensor) in Hugging Face's naming of our `{path: array}`."""
    for name in NAMES:
        if name.ours not in tree:
            continue
        leaf = tree[name.ours]
        slices = [(name.hf.format(i=i), leaf[i]) for i in range(len(leaf))] if name.stacked else [(name.hf, leaf)]
        for there, tensor in slices:
            yield there, np.ascontiguousarray(name.layout.to_theirs(np.asarray(tensor)))


def depth_of(tensors: Mapping[str, Any], naming: Naming) -> int:
    """Layers that the numbered names among `tensors` tell of."""
    stem = "encoder.layers" if naming == "hf" else "trunk.blocks"
    numbers = [int(match[1]) for name in tensors if (match := re.match(rf"{re.escape(stem)}\.(\d+)\.", name))]
    return max(numbers, default=-1) + 1
