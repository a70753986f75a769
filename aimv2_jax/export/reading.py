"""Encoders of others: Hugging Face's `Aimv2VisionModel` and `Aimv2Model`, and the files that Apple released."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from aimv2_jax.errors import UserError
from aimv2_jax.export import names
from aimv2_jax.export.names import Naming
from aimv2_jax.export.tensors import Tensors
from aimv2_jax.export.vision import Vision
from aimv2_jax.export.weights import Weights
from aimv2_jax.untrusted import as_int, as_number, read_json_object

CONFIG, PROCESSOR = "config.json", "preprocessor_config.json"
OURS = "aimv2_jax"  # What config.json says beside what Hugging Face asks: area and upscale of `Vision`.
HEAD_DIM = 128  # Of every released model (RECIPE.md §1): what a file alone does not say.
# The largest sizes that a config may ask for: far beyond every model, and small enough to compute with.
_MOST = {"hidden_size": 2**16, "intermediate_size": 2**18, "image_size": 2**14}
_MOST_OF_OTHERS = 2**12
_MOST_AREA = 2**20  # Patches.
_AGAIN = "Copy the model again, or mend its config.json"
_IMAGE_PATCHES = {"hf": "embeddings.patch_embed.weight", "apple": "preprocessor.patchifier.proj.weight"}
_GATE = {"hf": "encoder.layers.0.ffn.gate_proj.weight", "apple": "trunk.blocks.0.mlp.fc1.weight"}
_VISION_PART = "vision_model."  # Of `Aimv2Model`, beside which stand these:
_OTHER_PARTS = ("text_model.", "visual_projection.", "text_projection.", "logit_scale")
_TEXT_ONLY = ("embeddings.token_embedding.weight", "text_model.embeddings.token_embedding.weight")


def is_foreign(path: str | Path) -> bool:
    """Whether `path` is what `read_weights` reads: a safetensors file, or a folder of Hugging Face's."""
    path = Path(path)
    return path.suffix == ".safetensors" or (path / CONFIG).is_file() or any(path.glob("*.safetensors"))


def read_weights(path: str | Path, heads: int | None = None) -> Weights:
    """The encoder in a folder with its `config.json`, or in a safetensors file by itself.

    Every tensor must have its place, and every place its tensor.

    Args:
      path: the folder or file.
      heads: of a file by itself; by default width / 128.

    Raises:
      UserError: for what cannot be read, names no vision encoder, or does not fit together.
    """
    path = Path(path)
    if heads is not None and path.is_dir():
        raise UserError("heads are asked of a folder, whose config.json tells", heads, "Leave it out")
    tensors = Tensors(path)
    prefix = _VISION_PART if any(name.startswith(_VISION_PART) for name in tensors.shapes) else ""
    left = tuple(name for name in tensors.shapes if prefix and name.startswith(_OTHER_PARTS))
    there = {name.removeprefix(prefix): shape for name, shape in tensors.shapes.items() if name not in left}
    naming = _naming(there, path)
    vision = _from_config(path, there) if path.is_dir() else _from_shapes(there, naming, heads, path)
    shapes = vision.shapes()
    # The number of blocks is the file's word, and may be of any size: among so many blocks one has no tensor.
    blocks = min(vision.depth, len(there) + 1)
    _compare(there, names.expected(naming, shapes, blocks), prefix, path)

    def read(paths: Collection[str]) -> Mapping[str, np.ndarray]:
        return dict(names.to_ours(lambda name: tensors.read(prefix + name), naming, paths, vision.depth))

    return Weights(str(path), vision, shapes, read, left)


def _naming(there: Mapping[str, Any], path: Path) -> Naming:
    for naming, name in _IMAGE_PATCHES.items():
        if name in there:
            return naming
    if any(name in there for name in _TEXT_ONLY):
        raise UserError("a text model, not a vision encoder", str(path), "Give the vision model, or the whole of both")
    shown = ", ".join(sorted(there)[:3]) or "none"
    remedy = f"Give an AIMv2 vision encoder in Hugging Face's or Apple's names; its tensors are {shown}"
    raise UserError("no AIMv2 vision encoder: there is no patch embedding", str(path), remedy)


def _compare(
    there: Mapping[str, tuple[int, ...]], expected: Mapping[str, tuple[int, ...]], prefix: str, path: Path
) -> None:
    for name, shape in expected.items():
        if name not in there:
            raise UserError(f"{path} lacks a tensor", prefix + name, _AGAIN)
        if there[name] != shape:
            raise UserError(
                f"{path} has tensor {prefix}{name} in another shape",
                f"{there[name]}, expected {shape}",
                _AGAIN,
            )
    extra = [name for name in there if name not in expected]
    if extra:
        remedy = "Give a model without it: this one computes something else"
        raise UserError(f"{path} has a tensor that AIMv2's encoder lacks", prefix + extra[0], remedy)


def _from_config(folder: Path, there: Mapping[str, tuple[int, ...]]) -> Vision:
    config = _json(folder / CONFIG)
    whole, config = config, config.get("vision_config", config)
    if not isinstance(config, Mapping):
        raise UserError(f"{folder / CONFIG} has no usable vision_config", config, "Copy the model again")
    if whole.get("model_type") == "aimv2_text_model":
        raise UserError("a text model, not a vision encoder", str(folder), "Give the vision model")
    get = _Getter(config, folder / CONFIG)
    if get("hidden_act", "silu") != "silu":
        raise UserError(f"{folder / CONFIG} has another hidden_act", config["hidden_act"], "AIMv2 has silu")
    native = bool(get("is_native", _IMAGE_PATCHES["apple"] in there and "preprocessor.pos_embed" not in there))
    vision = Vision(
        width=get.number("hidden_size", 1024),
        depth=get.number("num_hidden_layers", 24),
        heads=get.number("num_attention_heads", 8),
        hidden=get.number("intermediate_size", 2816),
        patch_size=get.number("patch_size", 14),
        image_size=get.number("image_size", 224),
        position="sincos" if native else "learned",
        head=bool(get("use_head", any(name.startswith("head.") for name in there))),
        norm_eps=get.positive("rms_norm_eps", 1e-5),
    )
    _check(vision, folder / CONFIG)
    vision = _with_processor(vision, folder / PROCESSOR, native)
    ours = get(OURS, {})
    if not ours:
        return vision
    try:
        area = ours.get("area")
        area = None if area is None else as_int(area, 1, _MOST_AREA)
        upscale = ours.get("upscale", True)
    except (AttributeError, ValueError) as error:
        raise UserError(f"{folder / CONFIG} has an unusable {OURS}", ours, "Export the model again") from error
    return dataclasses.replace(vision, area=area, upscale=bool(upscale))


def _with_processor(vision: Vision, path: Path, native: bool) -> Vision:
    """With the numbers of the image processor, where there is one."""
    changes: dict[str, Any] = {}
    if path.is_file():
        processor = _json(path)
        for key, name in (("pixel_mean", "image_mean"), ("pixel_std", "image_std")):
            value = processor.get(name, getattr(vision, key))
            lowest = 0.0 if key == "pixel_mean" else 1e-6  # Nothing is divided by zero.
            try:
                red, green, blue = map(as_number, value)
                if min(red, green, blue) < lowest:
                    raise ValueError("below the lowest")
            except (TypeError, ValueError) as error:
                what = f"{path}: {name} is not three numbers of at least {lowest:g}"
                raise UserError(what, value, "Copy the model again") from error
            changes[key] = (red, green, blue)
        native = native and not processor.get("do_center_crop", False)
    rows, columns = vision.grid
    return dataclasses.replace(vision, area=rows * columns if native else None, **changes)


def _from_shapes(there: Mapping[str, tuple[int, ...]], naming: Naming, heads: int | None, path: Path) -> Vision:
    patches, gate = there[_IMAGE_PATCHES[naming]], there.get(_GATE[naming])
    if gate is None or len(patches) != 4:
        raise UserError(f"{path} lacks a tensor", _GATE[naming], "Copy the model again")
    width, patch_size = patches[0], patches[2]
    if heads is None and width % HEAD_DIM:
        raise UserError(
            "how many heads the attention has is not in a file by itself",
            f"{path}, {width} wide",
            "Say it by --heads, or put the model's config.json beside model.safetensors and give the folder",
        )
    [table] = [name.in_(naming) for name in names.NAMES if name.ours == names.POSITION]
    rows = there[table][-2] if table in there else (224 // patch_size) ** 2
    side = math.isqrt(rows)
    if side * side != rows:
        raise UserError(f"{path}: {table} is no square of patches", rows, "Give a model for square pictures")
    vision = Vision(
        width=width,
        depth=names.depth_of(there, naming),
        heads=heads or width // HEAD_DIM,
        hidden=gate[0],
        patch_size=patch_size,
        image_size=side * patch_size,
        position="learned" if table in there else "sincos",
        area=None if table in there else rows,
        head=any(name.startswith("head.") for name in there),
    )
    _check(vision, path)
    return vision


def _check(vision: Vision, path: Path) -> None:
    if vision.width % vision.heads:
        raise UserError(f"{path}: the width is no multiple of the heads", f"{vision.width}, {vision.heads}", "Mend it")
    if vision.image_size % vision.patch_size:
        raise UserError(
            f"{path}: the image size is no multiple of the patch size",
            f"{vision.image_size}, patches of {vision.patch_size}",
            "Mend image_size",
        )
    if vision.width % 4:
        raise UserError(f"{path}: the width is no multiple of 4", vision.width, "Mend it")


class _Getter:
    """Values of a config, `default` (Hugging Face's own) where it leaves them out."""

    def __init__(self, config: Mapping[str, Any], path: Path):
        self._config, self._path = config, path

    def __call__(self, key: str, default: Any) -> Any:
        return self._config.get(key, default)

    def positive(self, key: str, default: float) -> float:
        value = self(key, default)
        try:
            if (number := as_number(value)) > 0:
                return number
        except ValueError:
            pass
        raise UserError(f"{self._path}: {key} is not a number above zero", value, "Mend it")

    def number(self, key: str, default: int) -> int:
        value = self(key, default)
        if isinstance(value, list) and value and all(one == value[0] for one in value):  # (height, width)
            value = value[0]
        most = _MOST.get(key, _MOST_OF_OTHERS)
        try:
            return as_int(value, 1, most)
        except ValueError as error:
            what = f"{self._path}: {key} is not a whole number above zero and up to {most:,}"
            raise UserError(what, value, "Mend it") from error


def _json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        remedy = "Put the model's own there; or give the .safetensors file by itself, and --heads"
        raise UserError("the model's config is missing", str(path), remedy)
    try:
        return read_json_object(path)
    except ValueError as error:
        raise UserError(f"not a config ({error})", str(path), "Copy the model again") from error
