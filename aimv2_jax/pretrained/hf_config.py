"""Reads config.json and preprocessor_config.json of Hugging Face and Apple folders, which others wrote."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from aimv2_jax.errors import UserError
from aimv2_jax.models.dual_encoder import MAX_LOGIT_SCALE
from aimv2_jax.pretrained.dual_encoder_spec import DualEncoderSpec, TextSpec
from aimv2_jax.pretrained.encoder_spec import EncoderSpec
from aimv2_jax.untrusted import as_int, as_number, read_json_object

CONFIG, PROCESSOR = "config.json", "preprocessor_config.json"
AIMV2_JAX_KEY = "aimv2_jax"  # Key in config.json for fields without a Hugging Face name: area, upscale, logit_bias.
ASSUMED = (
    "assumed: no file gives them, and these are ImageNet's as in Apple's ml-aim, "
    "while Apple's Hugging Face processors and timm have CLIP's"
)
"""Where the mean and standard deviation of the pixels come from if no file gives them."""
# Upper bounds for config values: far beyond every model, and small enough to compute with.
_MAX_SIZES = {
    "hidden_size": 2**16,
    "intermediate_size": 2**18,
    "image_size": 2**14,
    "projection_dim": 2**16,
    "max_position_embeddings": 2**14,
    "vocab_size": 2**22,
    "eos_token_id": 2**22,
}
_MAX_OTHER_SIZE = 2**12
_MAX_AREA = 2**20  # Patches.
_STATISTICS = {"pixel_mean": "image_mean", "pixel_std": "image_std"}


class TowerConfigs(NamedTuple):
    """What a folder's files say about a model with a text tower; `logit_bias` is None for a softmax loss."""

    spec: DualEncoderSpec
    logit_bias: np.float32 | None


def read_encoder_spec(folder: Path, native: bool, head: bool) -> EncoderSpec:
    """The encoder's spec by the folder's config and image processor.

    Args:
      folder: with `config.json`; a config of both towers has the encoder's as `vision_config`.
      native: whether the model has sin-cos positions, where the config does not say it.
      head: whether the model has a pooled head, where the config does not say it.

    Raises:
      UserError: for unusable values.
    """
    config = _json(folder / CONFIG)
    if config.get("model_type") == "aimv2_text_model":
        raise UserError("a text model, not a vision encoder", str(folder), "Give the vision model")
    return _encoder_spec(_Getter(config, folder / CONFIG).part("vision_config", config), folder, native, head)


def read_dual_encoder_spec(folder: Path, native: bool, embed_dim: int) -> TowerConfigs:
    """The spec of both towers by the folder's config and image processor.

    Args:
      folder: with `config.json`.
      native: as for `read_encoder_spec`.
      embed_dim: width of the embeddings, where the config does not say it.

    Raises:
      UserError: for unusable values.
    """
    get = _Getter(_json(folder / CONFIG), folder / CONFIG)
    scale = get.positive("max_logit_scale", MAX_LOGIT_SCALE)
    if scale != MAX_LOGIT_SCALE:
        raise UserError(f"{folder / CONFIG} has another max_logit_scale", scale, f"AIMv2 has {MAX_LOGIT_SCALE:g}")
    text = get.part("text_config", {})
    text.check_activation()
    text_spec = TextSpec(
        vocab_size=text.number("vocab_size", 49408),
        width=text.number("hidden_size", 768),
        depth=text.number("num_hidden_layers", 12),
        heads=text.number("num_attention_heads", 6),
        hidden=text.number("intermediate_size", 2048),
        length=text.number("max_position_embeddings", 77),
        end_id=text.number("eos_token_id", 49407, least=0),
        norm_eps=text.positive("rms_norm_eps", 1e-5),
    )
    check_text_spec(text_spec, folder / CONFIG)
    image = _encoder_spec(get.part("vision_config", {}), folder, native, head=True)
    image = dataclasses.replace(image, head=True)  # Apple's own config of its model does not mention the head.
    bias = get.extension().get("logit_bias")
    try:
        logit_bias = None if bias is None else np.float32(as_number(bias))
    except ValueError as error:
        what = f"{folder / CONFIG} has an unusable {AIMV2_JAX_KEY}"
        raise UserError(what, bias, "Export the model again") from error
    loss = "softmax" if logit_bias is None else "sigmoid"
    spec = DualEncoderSpec(image, text_spec, get.number("projection_dim", embed_dim), loss)
    return TowerConfigs(spec, logit_bias)


def statistics_source(path: Path) -> str:
    """Says where mean and standard deviation of the pixels come from, for the folder or file of a model."""
    processor = path / PROCESSOR
    if not path.is_dir() or not processor.is_file() or not set(_STATISTICS.values()) <= _json(processor).keys():
        return ASSUMED
    return f"from {processor}"


def _encoder_spec(get: _Getter, folder: Path, native: bool, head: bool) -> EncoderSpec:
    get.check_activation()
    native = bool(get("is_native", native))
    spec = EncoderSpec(
        width=get.number("hidden_size", 1024),
        depth=get.number("num_hidden_layers", 24),
        heads=get.number("num_attention_heads", 8),
        hidden=get.number("intermediate_size", 2816),
        patch_size=get.number("patch_size", 14),
        image_size=get.number("image_size", 224),
        position="sincos" if native else "learned",
        head=bool(get("use_head", head)),
        norm_eps=get.positive("rms_norm_eps", 1e-5),
    )
    check_encoder_spec(spec, folder / CONFIG)
    spec = _with_processor(spec, folder / PROCESSOR, native)
    extension = get.extension()
    if "area" not in extension:
        return spec
    try:
        area = None if extension["area"] is None else as_int(extension["area"], 1, _MAX_AREA)
    except ValueError as error:
        what = f"{folder / CONFIG} has an unusable {AIMV2_JAX_KEY}"
        raise UserError(what, extension, "Export the model again") from error
    return dataclasses.replace(spec, area=area, upscale=bool(extension.get("upscale", True)))


def _with_processor(spec: EncoderSpec, path: Path, native: bool) -> EncoderSpec:
    """`spec` with the mean, standard deviation and cropping of the image processor's file, if there is one."""
    changes: dict[str, Any] = {}
    if path.is_file():
        processor = _json(path)
        for key, name in _STATISTICS.items():
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


def check_encoder_spec(spec: EncoderSpec, path: Path) -> None:
    """Raises `UserError` for an encoder whose sizes do not fit each other."""
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


def check_text_spec(spec: TextSpec, path: Path) -> None:
    """Raises `UserError` for a text tower whose sizes do not fit each other."""
    if spec.width % spec.heads:
        what = f"{path}: the text tower's width is not a multiple of its heads"
        raise UserError(what, f"{spec.width}, {spec.heads}", "Fix it")
    if spec.end_id >= spec.vocab_size:
        what = f"{path}: the end token is not in the vocabulary of {spec.vocab_size}"
        raise UserError(what, spec.end_id, "Fix eos_token_id")


class _Getter:
    """Checked values of a config; a missing key has Hugging Face's own default."""

    def __init__(self, config: Mapping[str, Any], path: Path):
        self._config = config
        self._path = path

    def __call__(self, key: str, default: Any) -> Any:
        return self._config.get(key, default)

    def part(self, key: str, default: Mapping[str, Any]) -> _Getter:
        config = self(key, default)
        if not isinstance(config, Mapping):
            raise UserError(f"{self._path} has no usable {key}", config, "Copy the model again")
        return _Getter(config, self._path)

    def extension(self) -> Mapping[str, Any]:
        extension = self(AIMV2_JAX_KEY, None) or {}
        if not isinstance(extension, Mapping):
            raise UserError(f"{self._path} has an unusable {AIMV2_JAX_KEY}", extension, "Export the model again")
        return extension

    def check_activation(self) -> None:
        activation = self("hidden_act", "silu")
        if activation != "silu":
            raise UserError(f"{self._path} has another hidden_act", activation, "AIMv2 has silu")

    def positive(self, key: str, default: float) -> float:
        value = self(key, default)
        try:
            if (number := as_number(value)) > 0:
                return number
        except ValueError:
            pass
        raise UserError(f"{self._path}: {key} is not a number above zero", value, "Fix it")

    def number(self, key: str, default: int, least: int = 1) -> int:
        value = self(key, default)
        if isinstance(value, list) and value and all(side == value[0] for side in value):  # (height, width)
            value = value[0]
        most = _MAX_SIZES.get(key, _MAX_OTHER_SIZE)
        try:
            return as_int(value, least, most)
        except ValueError as error:
            above = "above zero" if least == 1 else f"from {least}"
            what = f"{self._path}: {key} is not a whole number {above} and up to {most:,}"
            raise UserError(what, value, "Fix it") from error


def _json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        remedy = "Put the model's own file there; or give the .safetensors file alone, and --heads"
        raise UserError("the model's config is missing", str(path), remedy)
    try:
        return read_json_object(path)
    except ValueError as error:
        raise UserError(f"not a config ({error})", str(path), "Copy the model again") from error
