"""Import of Hugging Face's `Aimv2VisionModel` and `Aimv2Model`, and of Apple's released files."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from aimv2_jax.errors import UserError
from aimv2_jax.pretrained import param_names
from aimv2_jax.pretrained.encoder_spec import EncoderSpec
from aimv2_jax.pretrained.lazy_weights import LazyWeights
from aimv2_jax.pretrained.param_names import Naming
from aimv2_jax.pretrained.safetensors_io import Tensors
from aimv2_jax.untrusted import as_int, as_number, read_json_object

CONFIG, PROCESSOR = "config.json", "preprocessor_config.json"
AIMV2_JAX_KEY = "aimv2_jax"  # Key in config.json for fields without a Hugging Face name: area and upscale.
HEAD_DIM = 128  # The same in every released model (RECIPE.md §1); a file without a config does not contain it.
# Upper bounds for config values: far beyond every model, and small enough to compute with.
_MAX_SIZES = {"hidden_size": 2**16, "intermediate_size": 2**18, "image_size": 2**14}
_MAX_OTHER_SIZE = 2**12
_MAX_AREA = 2**20  # Patches.
_RECOPY = "Copy the model again, or fix its config.json"
_PATCH_EMBED = {"hf": "embeddings.patch_embed.weight", "apple": "preprocessor.patchifier.proj.weight"}
_GATE = {"hf": "encoder.layers.0.ffn.gate_proj.weight", "apple": "trunk.blocks.0.mlp.fc1.weight"}
_VISION_PREFIX = "vision_model."  # The encoder's tensors in an `Aimv2Model`, which also has _OTHER_PREFIXES.
_OTHER_PREFIXES = ("text_model.", "visual_projection.", "text_projection.", "logit_scale")
_TEXT_ONLY = ("embeddings.token_embedding.weight", "text_model.embeddings.token_embedding.weight")


def is_foreign(path: str | Path) -> bool:
    """True for a path that `read_weights` reads: a safetensors file or a Hugging Face folder."""
    path = Path(path)
    return path.suffix == ".safetensors" or (path / CONFIG).is_file() or any(path.glob("*.safetensors"))


def read_weights(path: str | Path, heads: int | None = None) -> LazyWeights:
    """Opens the encoder in a folder with its `config.json`, or in a single safetensors file.

    Tensors and parameters must match one to one.

    Args:
      path: the folder or file.
      heads: attention heads, for a single file; by default width / 128.

    Raises:
      UserError: for an unreadable path, a model without a vision encoder, or tensors that do not match.
    """
    path = Path(path)
    if heads is not None and path.is_dir():
        raise UserError("heads are given for a folder, whose config.json has them", heads, "Leave it out")
    tensors = Tensors(path)
    prefix = _VISION_PREFIX if any(name.startswith(_VISION_PREFIX) for name in tensors.shapes) else ""
    ignored = tuple(name for name in tensors.shapes if prefix and name.startswith(_OTHER_PREFIXES))
    available = {name.removeprefix(prefix): shape for name, shape in tensors.shapes.items() if name not in ignored}
    naming = _naming(available, path)
    spec = _from_config(path, available) if path.is_dir() else _from_shapes(available, naming, heads, path)
    shapes = spec.shapes()
    # A config may claim any depth. With more blocks than tensors, at least one block lacks a tensor.
    blocks = min(spec.depth, len(available) + 1)
    _compare(available, param_names.expected(naming, shapes, blocks), prefix, path)

    def read(paths: Collection[str]) -> Mapping[str, np.ndarray]:
        return dict(param_names.to_ours(lambda name: tensors.read(prefix + name), naming, paths, spec.depth))

    return LazyWeights(str(path), spec, shapes, read, ignored)


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


def _compare(
    available: Mapping[str, tuple[int, ...]], expected: Mapping[str, tuple[int, ...]], prefix: str, path: Path
) -> None:
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


def _from_config(folder: Path, available: Mapping[str, tuple[int, ...]]) -> EncoderSpec:
    model_config = _json(folder / CONFIG)
    config = model_config.get("vision_config", model_config)
    if not isinstance(config, Mapping):
        raise UserError(f"{folder / CONFIG} has no usable vision_config", config, "Copy the model again")
    if model_config.get("model_type") == "aimv2_text_model":
        raise UserError("a text model, not a vision encoder", str(folder), "Give the vision model")
    get = _Getter(config, folder / CONFIG)
    if get("hidden_act", "silu") != "silu":
        raise UserError(f"{folder / CONFIG} has another hidden_act", config["hidden_act"], "AIMv2 has silu")
    native = bool(get("is_native", _PATCH_EMBED["apple"] in available and "preprocessor.pos_embed" not in available))
    spec = EncoderSpec(
        width=get.number("hidden_size", 1024),
        depth=get.number("num_hidden_layers", 24),
        heads=get.number("num_attention_heads", 8),
        hidden=get.number("intermediate_size", 2816),
        patch_size=get.number("patch_size", 14),
        image_size=get.number("image_size", 224),
        position="sincos" if native else "learned",
        head=bool(get("use_head", any(name.startswith("head.") for name in available))),
        norm_eps=get.positive("rms_norm_eps", 1e-5),
    )
    _check(spec, folder / CONFIG)
    spec = _with_processor(spec, folder / PROCESSOR, native)
    extension = get(AIMV2_JAX_KEY, {})
    if not extension:
        return spec
    try:
        area = extension.get("area")
        area = None if area is None else as_int(area, 1, _MAX_AREA)
        upscale = extension.get("upscale", True)
    except (AttributeError, ValueError) as error:
        what = f"{folder / CONFIG} has an unusable {AIMV2_JAX_KEY}"
        raise UserError(what, extension, "Export the model again") from error
    return dataclasses.replace(spec, area=area, upscale=bool(upscale))


def _with_processor(spec: EncoderSpec, path: Path, native: bool) -> EncoderSpec:
    """`spec` with the mean, standard deviation and cropping of the image processor's file, if there is one."""
    changes: dict[str, Any] = {}
    if path.is_file():
        processor = _json(path)
        for key, name in (("pixel_mean", "image_mean"), ("pixel_std", "image_std")):
            value = processor.get(name, getattr(spec, key))
            minimum = 0.0 if key == "pixel_mean" else 1e-6  # Pixels are divided by pixel_std.
            try:
                red, green, blue = map(as_number, value)
                if min(red, green, blue) < minimum:
                    raise ValueError("below the minimum")
            except (TypeError, ValueError) as error:
                what = f"{path}: {name} is not three numbers of at least {minimum:g}"
                raise UserError(what, value, "Copy the model again") from error
            changes[key] = (red, green, blue)
        native = native and not processor.get("do_center_crop", False)
    rows, columns = spec.grid
    return dataclasses.replace(spec, area=rows * columns if native else None, **changes)


def _from_shapes(
    available: Mapping[str, tuple[int, ...]], naming: Naming, heads: int | None, path: Path
) -> EncoderSpec:
    patches, gate = available[_PATCH_EMBED[naming]], available.get(_GATE[naming])
    if gate is None or len(patches) != 4:
        raise UserError(f"{path} lacks a tensor", _GATE[naming], "Copy the model again")
    width, patch_size = patches[0], patches[2]
    if heads is None and width % HEAD_DIM:
        raise UserError(
            "a .safetensors file does not contain the number of attention heads",
            f"{path}, {width} wide",
            "Give --heads, or put the model's config.json beside model.safetensors and give the folder",
        )
    [table] = [name.name_in(naming) for name in param_names.NAMES if name.ours == param_names.POSITION]
    rows = available[table][-2] if table in available else (224 // patch_size) ** 2
    side = math.isqrt(rows)
    if side * side != rows:
        raise UserError(f"{path}: {table} is not a square of patches", rows, "Give a model for square images")
    spec = EncoderSpec(
        width=width,
        depth=param_names.depth_of(available, naming),
        heads=heads or width // HEAD_DIM,
        hidden=gate[0],
        patch_size=patch_size,
        image_size=side * patch_size,
        position="learned" if table in available else "sincos",
        area=None if table in available else rows,
        head=any(name.startswith("head.") for name in available),
    )
    _check(spec, path)
    return spec


def _check(spec: EncoderSpec, path: Path) -> None:
    if spec.width % spec.heads:
        raise UserError(f"{path}: the width is not a multiple of the heads", f"{spec.width}, {spec.heads}", "Fix it")
    if spec.image_size % spec.patch_size:
        raise UserError(
            f"{path}: the image size is not a multiple of the patch size",
            f"{spec.image_size}, patches of {spec.patch_size}",
            "Fix image_size",
        )
    if spec.width % 4:
        raise UserError(f"{path}: the width is not a multiple of 4", spec.width, "Fix it")


class _Getter:
    """Checked values of a config; a missing key has Hugging Face's own default."""

    def __init__(self, config: Mapping[str, Any], path: Path):
        self._config = config
        self._path = path

    def __call__(self, key: str, default: Any) -> Any:
        return self._config.get(key, default)

    def positive(self, key: str, default: float) -> float:
        value = self(key, default)
        try:
            if (number := as_number(value)) > 0:
                return number
        except ValueError:
            pass
        raise UserError(f"{self._path}: {key} is not a number above zero", value, "Fix it")

    def number(self, key: str, default: int) -> int:
        value = self(key, default)
        if isinstance(value, list) and value and all(side == value[0] for side in value):  # (height, width)
            value = value[0]
        most = _MAX_SIZES.get(key, _MAX_OTHER_SIZE)
        try:
            return as_int(value, 1, most)
        except ValueError as error:
            what = f"{self._path}: {key} is not a whole number above zero and up to {most:,}"
            raise UserError(what, value, "Fix it") from error


def _json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        remedy = "Put the model's own file there; or give the .safetensors file alone, and --heads"
        raise UserError("the model's config is missing", str(path), remedy)
    try:
        return read_json_object(path)
    except ValueError as error:
        raise UserError(f"not a config ({error})", str(path), "Copy the model again") from error
