"""Maps the parameter names of Apple's trainer to our tree, for the golden tests."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping

import jax
import numpy as np

Rule = tuple[str, str, Callable[[np.ndarray], np.ndarray]]


def same(x):
    return x


def transposed(x):
    return x.T


def flat(x):
    """Convolution weight [out, RGB, row, column] as our matrix [(row, column, RGB), out]."""
    return x.transpose(2, 3, 1, 0).reshape(-1, x.shape[0])


def vector(x):
    return x.reshape(-1)


def table(x):
    return x.reshape(x.shape[-2:])


_APPLE_BLOCK = [
    ("attn.q_proj.weight", "attention/query/kernel", transposed),
    ("attn.k_proj.weight", "attention/key/kernel", transposed),
    ("attn.v_proj.weight", "attention/value/kernel", transposed),
    ("attn.proj.weight", "attention/out/kernel", transposed),
    ("mlp.fc1.weight", "mlp/gate/kernel", transposed),
    ("mlp.fc3.weight", "mlp/up/kernel", transposed),
    ("mlp.fc2.weight", "mlp/down/kernel", transposed),
    ("norm_1.weight", "norm_1/scale", same),
    ("norm_2.weight", "norm_2/scale", same),
]


def _blocks(theirs: str, ours: str, block: list[Rule]) -> list[Rule]:
    return [(f"{theirs}.{{i}}.{name}", f"{ours}/{path}", change) for name, path, change in block]


_ENCODER, _TEXT = "models.image_encoder", "models.text_decoder.preprocessor.text_preprocessor"
_PATCH = f"{_ENCODER}.preprocessor.blocks.0"
APPLE_PRETRAIN: list[Rule] = [
    (f"{_PATCH}.patchifier.proj.weight", "encoder/patch_embed/kernel", flat),
    (f"{_PATCH}.patchifier.proj.bias", "encoder/patch_embed/bias", same),
    (f"{_PATCH}.patchifier.norm.weight", "encoder/patch_norm/scale", same),
    (f"{_PATCH}.pos_embed", "encoder/position", table),
    *_blocks(f"{_ENCODER}.trunk.blocks", "encoder/trunk/blocks", _APPLE_BLOCK),
    (f"{_ENCODER}.trunk.post_trunk_norm.weight", "encoder/trunk/norm/scale", same),
    ("models.text_decoder.preprocessor.vision_preprocessor.module.weight", "decoder/image_embed/kernel", transposed),
    ("models.text_decoder.preprocessor.vision_preprocessor.module.bias", "decoder/image_embed/bias", same),
    (f"{_TEXT}.cls_token", "decoder/begin", vector),
    (f"{_TEXT}.positional_embedding", "decoder/position", same),
    (f"{_TEXT}.text_embedding.weight", "decoder/token_table", same),
    *_blocks("models.text_decoder.trunk.blocks", "decoder/trunk/blocks", _APPLE_BLOCK),
    ("models.text_decoder.trunk.post_trunk_norm.weight", "decoder/trunk/norm/scale", same),
    ("models.text_decoder.head.blocks.0.linear.weight", "decoder/token_head/kernel", transposed),
    ("models.text_decoder.head.blocks.1.linear.weight", "decoder/pixel_head/kernel", transposed),
]


def to_ours(tensors: Mapping[str, np.ndarray], rules: list[Rule]) -> dict[str, np.ndarray]:
    """Their tensors as {our path: array}, blocks stacked. Every tensor needs a rule; layers must be contiguous."""
    remaining = dict(tensors)
    ours = {}
    for theirs, path, change in rules:
        if "{i}" not in theirs:
            if theirs in remaining:
                ours[path] = change(remaining.pop(theirs))
            continue
        pattern = re.compile(re.escape(theirs).replace(r"\{i\}", r"(\d+)") + "$")
        layers = {int(match[1]): name for name in remaining if (match := pattern.match(name))}
        assert sorted(layers) == list(range(len(layers))) and layers, f"layers of {theirs}: {sorted(layers)}"
        ours[path] = np.stack([change(remaining.pop(layers[i])) for i in range(len(layers))])
    assert not remaining, f"tensors without a rule: {sorted(remaining)}"
    return ours


def paths(tree) -> dict[str, jax.Array]:
    """A parameter tree as {path: leaf}."""
    return {"/".join(key.key for key in path): leaf for path, leaf in jax.tree.leaves_with_path(tree)}


def nested(flat_tree: Mapping[str, np.ndarray]) -> dict:
    """{path: leaf} as the nested tree."""
    tree: dict = {}
    for path, leaf in flat_tree.items():
        *parents, name = path.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[name] = leaf
    return tree
