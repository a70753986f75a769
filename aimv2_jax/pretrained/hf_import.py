"""Import of Hugging Face's `Aimv2VisionModel` and `Aimv2Model`, and of Apple's released files."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from aimv2_jax.errors import UserError
from aimv2_jax.pretrained import hf_config, param_names
from aimv2_jax.pretrained.dual_encoder_spec import DualEncoderSpec, TextSpec
from aimv2_jax.pretrained.encoder_spec import EncoderSpec
from aimv2_jax.pretrained.hf_config import CONFIG
from aimv2_jax.pretrained.lazy_weights import LazyWeights
from aimv2_jax.pretrained.param_names import IMAGE_PREFIX, Naming
from aimv2_jax.pretrained.safetensors_io import Tensors
from aimv2_jax.pretrained.tokenizer_file import tokenizer_beside

HEAD_DIM = 128  # The same in every released model (RECIPE.md §1); a file without a config does not contain it.
_RECOPY = "Copy the model again, or fix its config.json"
_PATCH_EMBED = {"hf": "embeddings.patch_embed.weight", "apple": "preprocessor.patchifier.proj.weight"}
_GATE = {"hf": "encoder.layers.0.ffn.gate_proj.weight", "apple": "trunk.blocks.0.mlp.fc1.weight"}
_TEXT_PREFIX: dict[Naming, str] = {"hf": "text_model.", "apple": "text_encoder."}
_OTHER_PREFIXES: dict[Naming, tuple[str, ...]] = {
    "hf": (_TEXT_PREFIX["hf"], "visual_projection.", "text_projection.", "logit_scale"),
    "apple": (_TEXT_PREFIX["apple"], "image_projector.", "text_projector.", "log_logit_scale"),
}
_TOKEN_TABLE = "text/token_table"
_TEXT_ONLY = ("embeddings.token_embedding.weight", "text_model.embeddings.token_embedding.weight")
Shapes = Mapping[str, tuple[int, ...]]


def is_foreign(path: str | Path) -> bool:
    """True for a path that `read_weights` reads: a safetensors file or a Hugging Face folder."""
    path = Path(path)
    return path.suffix == ".safetensors" or (path / CONFIG).is_file() or any(path.glob("*.safetensors"))


def has_text_tower(path: str | Path) -> bool:
    """True for a foreign path that `read_dual_weights` reads: it has an image encoder and a text tower."""
    shapes = Tensors(Path(path)).shapes
    naming = _naming_of_both(shapes)
    return naming is not None and _external(_TOKEN_TABLE, naming) in shapes


def read_weights(path: str | Path, heads: int | None = None) -> LazyWeights[EncoderSpec]:
    """Opens the encoder in a folder with its `config.json`, or in a single safetensors file.

    Tensors and parameters must match one to one; those of a text tower are ignored.

    Args:
      path: the folder or file.
      heads: attention heads, for a single file; by default width / 128.

    Raises:
      UserError: for an unreadable path, a model without a vision encoder, or tensors that do not match.
    """
    path = Path(path)
    _check_heads(path, heads)
    tensors = Tensors(path)
    both = _naming_of_both(tensors.shapes)
    prefix = IMAGE_PREFIX[both] if both else ""
    ignored = tuple(name for name in tensors.shapes if both and name.startswith(_OTHER_PREFIXES[both]))
    available = {name.removeprefix(prefix): shape for name, shape in tensors.shapes.items() if name not in ignored}
    naming = both or _naming(available, path)
    spec = _encoder_spec(path, available, naming, heads)
    shapes = spec.shapes()
    # A config may claim any depth. With more blocks than tensors, at least one block lacks a tensor.
    expected = param_names.expected(naming, shapes, max_blocks=len(available) + 1)
    _compare(available, expected, prefix, path)

    def read(paths: Collection[str]) -> Mapping[str, np.ndarray]:
        return dict(param_names.to_ours(lambda name: tensors.read(prefix + name), naming, shapes, paths))

    return LazyWeights(str(path), spec, shapes, read, ignored, statistics_source=hf_config.statistics_source(path))


def read_dual_weights(path: str | Path, heads: int | None = None) -> LazyWeights[DualEncoderSpec]:
    """Opens both towers in a folder with its `config.json`, or in a single safetensors file.

    Args:
      path: the folder or file.
      heads: attention heads of the image encoder, for a single file; by default width / 128.

    Raises:
      UserError: for an unreadable path, a model without a text tower, or tensors that do not match.
    """
    path = Path(path)
    _check_heads(path, heads)
    tensors = Tensors(path)
    naming = _naming_of_both(tensors.shapes)
    if naming is None or _external(_TOKEN_TABLE, naming) not in tensors.shapes:
        raise UserError("the model has no text tower", str(path), "Give an Aimv2Model, or Apple's file of a LiT model")
    spec, logit_bias = _dual_encoder_spec(path, tensors.shapes, naming, heads)
    shapes = spec.shapes()
    max_blocks = len(tensors.shapes) + 1
    _compare(tensors.shapes, param_names.expected(naming, shapes, param_names.DUAL_NAMES, max_blocks), "", path)

    def read(paths: Collection[str]) -> Mapping[str, np.ndarray]:
        arrays = dict(param_names.to_ours(tensors.read, naming, shapes, paths, param_names.DUAL_NAMES))
        return arrays | ({"logit_bias": np.asarray(logit_bias)} if "logit_bias" in paths else {})

    statistics_source, tokenizer = hf_config.statistics_source(path), tokenizer_beside(path)
    return LazyWeights(str(path), spec, shapes, read, statistics_source=statistics_source, tokenizer=tokenizer)


def _check_heads(path: Path, heads: int | None) -> None:
    if heads is not None and path.is_dir():
        raise UserError("heads are given for a folder, whose config.json has them", heads, "Leave it out")


def _external(ours: str, naming: Naming) -> str:
    """The external name of one of our tensors in a model with both towers."""
    [name] = [name.name_in(naming) for name in param_names.DUAL_NAMES if name.ours == ours]
    return name


def _naming_of_both(shapes: Shapes) -> Naming | None:
    """The naming of a model with an image encoder under a prefix, or None for an encoder by itself."""
    found = [naming for naming, prefix in IMAGE_PREFIX.items() if any(name.startswith(prefix) for name in shapes)]
    return found[0] if found else None


def _naming(available: Mapping[str, Any], path: Path) -> Naming:
    for naming, name in _PATCH_EMBED.items():
        if name in available:
            return naming
    if any(name in available for name in _TEXT_ONLY):
        remedy = "Give the vision model, or the model with both parts"
        raise UserError("a text model, not a vision encoder", str(path), remedy)
    examples = ", ".join(sorted(available)[:3]) or "none"
    remedy = f"Give an AIMv2 vision encoder in Hugging Face's or Apple's names; its tensors are {examples}"
    raise UserError("not an AIMv2 vision encoder: it has no patch embedding", str(path), remedy)


def _compare(available: Shapes, expected: Shapes, prefix: str, path: Path) -> None:
    for name, shape in expected.items():
        if name not in available:
            raise UserError(f"{path} lacks a tensor", prefix + name, _RECOPY)
        if available[name] != shape:
            raise UserError(
                f"{path} has tensor {prefix}{name} with another shape",
                f"{available[name]}, expected {shape}",
                _RECOPY,
            )
    extra = [name for name in available if name not in expected]
    if extra:
        remedy = "Give a model without it: this one computes something else"
        raise UserError(f"{path} has a tensor that AIMv2's encoder lacks", prefix + extra[0], remedy)


def _encoder_spec(path: Path, available: Shapes, naming: Naming, heads: int | None) -> EncoderSpec:
    """The spec of the encoder whose tensors are `available`, by the folder's config or by their shapes."""
    if not path.is_dir():
        return _encoder_spec_of_shapes(available, naming, heads, path)
    head = any(name.startswith("head.") for name in available)
    return hf_config.read_encoder_spec(path, naming == "apple" and "preprocessor.pos_embed" not in available, head)


def _encoder_spec_of_shapes(available: Shapes, naming: Naming, heads: int | None, path: Path) -> EncoderSpec:
    patches, gate = available.get(_PATCH_EMBED[naming], ()), available.get(_GATE[naming])
    if gate is None or len(patches) != 4:
        raise UserError(f"{path} lacks a tensor", _GATE[naming], "Copy the model again")
    width, patch_size = patches[0], patches[2]
    [table] = [name.name_in(naming) for name in param_names.NAMES if name.ours == param_names.POSITION]
    rows = available[table][-2] if table in available else (224 // patch_size) ** 2
    side = math.isqrt(rows)
    if side * side != rows:
        raise UserError(f"{path}: {table} is not a square of patches", rows, "Give a model for square images")
    spec = EncoderSpec(
        width=width,
        depth=param_names.depth_of(available, naming),
        heads=heads or _heads_of(width, path),
        hidden=gate[0],
        patch_size=patch_size,
        image_size=side * patch_size,
        position="learned" if table in available else "sincos",
        area=None if table in available else rows,
        head=any(name.startswith("head.") for name in available),
    )
    hf_config.check_encoder_spec(spec, path)
    return spec


def _heads_of(width: int, path: Path) -> int:
    if width % HEAD_DIM:
        raise UserError(
            "a .safetensors file does not contain the number of attention heads",
            f"{path}, {width} wide",
            "Give --heads, or put the model's config.json beside model.safetensors and give the folder",
        )
    return width // HEAD_DIM


def _dual_encoder_spec(path: Path, shapes: Shapes, naming: Naming, heads: int | None) -> hf_config.TowerConfigs:
    """The spec of both towers, by the folder's config or by the shapes of the tensors."""
    image_shapes = {
        name.removeprefix(IMAGE_PREFIX[naming]): shape
        for name, shape in shapes.items()
        if name.startswith(IMAGE_PREFIX[naming])
    }
    if not any(name.startswith("head.") for name in image_shapes):
        raise UserError("the model's image encoder has no pooled head", str(path), "Give a model that has one")
    embed_dim = shapes.get(_external("text_projection/kernel", naming), (0,))[0]
    if path.is_dir():
        native = naming == "apple" and "preprocessor.pos_embed" not in image_shapes
        return hf_config.read_dual_encoder_spec(path, native, embed_dim)
    image = _encoder_spec_of_shapes(image_shapes, naming, heads, path)
    text = _text_spec_of_shapes(shapes, naming, path)
    return hf_config.TowerConfigs(DualEncoderSpec(image, text, embed_dim), None)


def _text_spec_of_shapes(shapes: Shapes, naming: Naming, path: Path) -> TextSpec:
    """The text tower's spec; its end token is the last of the vocabulary, as in CLIP's."""
    table, position, gate = (
        shapes.get(_external(ours, naming).format(i=0), ())
        for ours in (_TOKEN_TABLE, "text/position", "text/trunk/blocks/mlp/gate/kernel")
    )
    if not all(len(shape) == 2 for shape in (table, position, gate)):
        raise UserError(f"{path} lacks a tensor of the text tower's first block", str(path), "Copy the model again")
    vocab_size, width = table
    return TextSpec(
        vocab_size=vocab_size,
        width=width,
        depth=param_names.depth_of(shapes, naming, _TEXT_PREFIX[naming]),
        heads=_heads_of(width, path),
        hidden=gate[0],
        length=position[0],
        end_id=vocab_size - 1,
    )
