"""Parameter name tables for both directions: ours, Hugging Face's, and those of Apple's released files.

Ours are paths in {"encoder": …, "head": …}, and of a model with a text tower also {"text": …} and the projections;
leaves of blocks are stacked over layers, which the others number as {i}.
"""

from __future__ import annotations

import dataclasses
import itertools
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import einops
import numpy as np

Naming = Literal["hf", "apple"]
Array = np.ndarray


class TensorLayout(NamedTuple):
    """Conversion of a tensor between an external layout and ours."""

    to_ours: Callable[[Array], Array]
    to_hf: Callable[[Array], Array]
    to_apple: Callable[[Array], Array]


def _patch_matrix(conv: Array) -> Array:
    return einops.rearrange(conv, "d c h w -> (h w c) d")


def _patch_conv(matrix: Array) -> Array:
    side = round((matrix.shape[0] / 3) ** 0.5)
    return einops.rearrange(matrix, "(h w c) d -> d c h w", h=side, w=side)


def _same(x: Array) -> Array:
    return x


def _transposed(x: Array) -> Array:
    return x.T


def _row(x: Array) -> Array:
    return x.reshape(1, 1, -1)


SAME = TensorLayout(_same, _same, _same)
MATRIX = TensorLayout(_transposed, _transposed, _transposed)  # Externally [out, in].
PATCHES = TensorLayout(_patch_matrix, _patch_conv, _patch_conv)  # Externally a convolution's [out, RGB, row, column].
TABLE = TensorLayout(lambda x: x.reshape(x.shape[-2:]), _same, lambda x: x[None])  # Apple has a leading axis of 1.
QUERY = TensorLayout(lambda x: x.reshape(-1), _row, _row)


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

    def to_theirs(self, naming: Naming, array: Array) -> Array:
        """`array` of one layer in the external layout; of a fused matrix, this tensor's part."""
        return (self.layout.to_hf if naming == "hf" else self.layout.to_apple)(array)

    @property
    def stacked(self) -> bool:
        return "{i}" in self.hf


NUM_FUSED = 3  # Query, key and value in one matrix.


def _blocks(ours: str, hf: str, apple: str) -> Iterator[ParamName]:
    """The tensors of the blocks of a trunk; the arguments name where its blocks are."""
    for leaf, hf_leaf, apple_leaf, layout, part in (
        ("norm_1/scale", "rms_norm1", "norm_1", SAME, None),
        ("attention/query/kernel", "attention.q_proj", "attn.qkv", MATRIX, 0),
        ("attention/key/kernel", "attention.k_proj", "attn.qkv", MATRIX, 1),
        ("attention/value/kernel", "attention.v_proj", "attn.qkv", MATRIX, 2),
        ("attention/out/kernel", "attention.out_proj", "attn.proj", MATRIX, None),
        ("norm_2/scale", "rms_norm2", "norm_2", SAME, None),
        ("mlp/gate/kernel", "ffn.gate_proj", "mlp.fc1", MATRIX, None),
        ("mlp/up/kernel", "ffn.up_proj", "mlp.fc3", MATRIX, None),
        ("mlp/down/kernel", "ffn.down_proj", "mlp.fc2", MATRIX, None),
    ):
        yield ParamName(
            f"{ours}/{leaf}", f"{hf}.{{i}}.{hf_leaf}.weight", f"{apple}.{{i}}.{apple_leaf}.weight", layout, part
        )


_CONV = "preprocessor.patchifier"
NAMES: tuple[ParamName, ...] = (
    ParamName("encoder/patch_embed/kernel", "embeddings.patch_embed.weight", f"{_CONV}.proj.weight", PATCHES),
    ParamName("encoder/patch_embed/bias", "embeddings.patch_embed.bias", f"{_CONV}.proj.bias", SAME),
    ParamName("encoder/patch_norm/scale", "embeddings.rms_norm.weight", f"{_CONV}.norm.weight", SAME),
    ParamName("encoder/position", "embeddings.position_embedding.weight", "preprocessor.pos_embed", TABLE),
    *_blocks("encoder/trunk/blocks", "encoder.layers", "trunk.blocks"),
    ParamName("encoder/trunk/norm/scale", "rms_norm.weight", "trunk.post_trunk_norm.weight", SAME),
    ParamName("head/pool/query", "head.cls_token", "head.cls_token", QUERY),
    ParamName("head/pool/key/kernel", "head.k_proj.weight", "head.k.weight", MATRIX),
    ParamName("head/pool/value/kernel", "head.v_proj.weight", "head.v.weight", MATRIX),
    ParamName("head/output/kernel", "head.output_proj.weight", "head.linear.weight", MATRIX),
    ParamName("head/output/bias", "head.output_proj.bias", "head.linear.bias", SAME),
)
"""The tensors of an encoder by itself."""
POSITION = "encoder/position"
IMAGE_PREFIX: dict[Naming, str] = {"hf": "vision_model.", "apple": "image_encoder."}
"""Prefix of the encoder's tensors in a model with a text tower."""
_TEXT, _APPLE_TEXT = "text_model", "text_encoder"
OTHER_NAMES: tuple[ParamName, ...] = (
    ParamName("image_projection/kernel", "visual_projection.weight", "image_projector.weight", MATRIX),
    ParamName(
        "text/token_table",
        f"{_TEXT}.embeddings.token_embedding.weight",
        f"{_APPLE_TEXT}.preprocessor.text_embedding.weight",
        SAME,
    ),
    ParamName(
        "text/position",
        f"{_TEXT}.embeddings.position_embedding.weight",
        f"{_APPLE_TEXT}.preprocessor.positional_embedding",
        SAME,
    ),
    *_blocks("text/trunk/blocks", f"{_TEXT}.encoder.layers", f"{_APPLE_TEXT}.trunk.blocks"),
    ParamName("text/trunk/norm/scale", f"{_TEXT}.rms_norm.weight", f"{_APPLE_TEXT}.trunk.post_trunk_norm.weight", SAME),
    ParamName("text_projection/kernel", "text_projection.weight", "text_projector.weight", MATRIX),
    ParamName("logit_scale", "logit_scale", "log_logit_scale", SAME),
)
"""The other tensors of a model with a text tower."""
DUAL_NAMES: tuple[ParamName, ...] = (
    *(
        dataclasses.replace(name, hf=IMAGE_PREFIX["hf"] + name.hf, apple=IMAGE_PREFIX["apple"] + name.apple)
        for name in NAMES
    ),
    *OTHER_NAMES,
)
"""The tensors of a model with both towers."""


def expected(
    naming: Naming,
    shapes: Mapping[str, tuple[int, ...]],
    names: Sequence[ParamName] = NAMES,
    max_blocks: int | None = None,
) -> dict[str, tuple[int, ...]]:
    """External name and shape of every tensor, from the shapes of ours (`{path: shape}`).

    `max_blocks` bounds the blocks that are listed of each trunk.
    """
    external: dict[str, tuple[int, ...]] = {}
    for name in names:
        if name.ours not in shapes:
            continue
        ours = shapes[name.ours][1:] if name.stacked else shapes[name.ours]
        theirs = name.to_theirs(naming, np.broadcast_to(np.float32(0), ours)).shape
        if naming == "apple" and name.part is not None:
            theirs = (NUM_FUSED * theirs[0], *theirs[1:])
        blocks = range(shapes[name.ours][0])[:max_blocks] if name.stacked else (None,)
        for layer in blocks:
            external[name.name_in(naming).format(i=layer)] = tuple(theirs)
    return external


def to_ours(
    read: Callable[[str], Array],
    naming: Naming,
    shapes: Mapping[str, tuple[int, ...]],
    paths: Collection[str],
    names: Sequence[ParamName] = NAMES,
) -> Iterator[tuple[str, Array]]:
    """Yields (path, array) of our `paths`, blocks stacked; `read` returns a tensor by its external name."""
    for name in names:
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
            yield name.ours, np.stack([convert(external.format(i=layer)) for layer in range(shapes[name.ours][0])])
        else:
            yield name.ours, np.asarray(convert(external), order="C")


def to_theirs(
    tree: Mapping[str, Array], naming: Naming, names: Sequence[ParamName] = NAMES
) -> Iterator[tuple[str, Array]]:
    """Yields (name, tensor) in `naming` from our `{path: array}`, in the order of `expected`."""
    present = (name for name in names if name.ours in tree)
    # The parts of a fused matrix are neighbours in the tables.
    for external, group in itertools.groupby(present, key=lambda name: name.name_in(naming)):
        parts = list(group)
        for layer in range(len(tree[parts[0].ours])) if parts[0].stacked else (...,):
            tensors = [part.to_theirs(naming, np.asarray(tree[part.ours])[layer]) for part in parts]
            whole = np.concatenate(tensors) if len(tensors) > 1 else tensors[0]
            yield external.format(i=layer), np.asarray(whole, order="C")


def depth_of(tensors: Mapping[str, Any], naming: Naming, prefix: str = "") -> int:
    """Number of layers, from the numbered names among `tensors`; `prefix` comes before the names of an encoder."""
    stem = prefix + ("encoder.layers" if naming == "hf" else "trunk.blocks")
    numbers = [int(match[1]) for name in tensors if (match := re.match(rf"{re.escape(stem)}\.(\d+)\.", name))]
    return max(numbers, default=-1) + 1
