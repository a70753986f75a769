"""What Hugging Face's and Apple's folders have in common: tensors, image processor, tokenizer and model card."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from aimv2_jax.export.model_card import model_card
from aimv2_jax.models.dual_encoder import MAX_LOGIT_SCALE
from aimv2_jax.pretrained import param_names
from aimv2_jax.pretrained.dual_encoder_spec import DualEncoderSpec, TextSpec
from aimv2_jax.pretrained.encoder_spec import EncoderSpec
from aimv2_jax.pretrained.hf_config import AIMV2_JAX_KEY, CONFIG, PROCESSOR
from aimv2_jax.pretrained.lazy_weights import LazyWeights
from aimv2_jax.pretrained.param_names import Naming
from aimv2_jax.pretrained.safetensors_io import write_tensors
from aimv2_jax.pretrained.tokenizer_file import copy_tokenizer

CARD = "README.md"
_DTYPES = {"float32": np.dtype(np.float32), "float16": np.dtype(np.float16), "bfloat16": np.dtype(ml_dtypes.bfloat16)}
_BICUBIC = 3  # Pillow's value.


def cast(array: np.ndarray, dtype: str) -> np.ndarray:
    """`array` as `dtype`, rounded to nearest."""
    return array.astype(_DTYPES[dtype])


def write_files(
    folder: Path, weights: LazyWeights, naming: Naming, dtype: str, max_file_bytes: float, config: dict[str, Any]
) -> None:
    """Writes tensors as `dtype` in files of at most `max_file_bytes`, `config`, image processor, tokenizer and card."""
    names = param_names.DUAL_NAMES if isinstance(weights.spec, DualEncoderSpec) else param_names.NAMES
    tree = {path: cast(leaf, dtype) for path, leaf in weights.read().items()}
    shapes = param_names.expected(naming, weights.shapes, names)
    sizes = {name: math.prod(shape) * _DTYPES[dtype].itemsize for name, shape in shapes.items()}
    write_tensors(folder, param_names.to_theirs(tree, naming, names), sizes, max_file_bytes)
    write_json(folder / CONFIG, config)
    write_json(folder / PROCESSOR, processor_json(weights.image))
    if weights.tokenizer is not None:
        copy_tokenizer(weights.tokenizer, folder)
    (folder / CARD).write_text(model_card(weights, dtype, len(sizes), naming), encoding="utf-8")


def vision_fields(spec: EncoderSpec) -> dict[str, Any]:
    """The fields of `Aimv2VisionConfig`, which Apple's configs have too."""
    return {
        "hidden_size": spec.width,
        "intermediate_size": spec.hidden,
        "num_hidden_layers": spec.depth,
        "num_attention_heads": spec.heads,
        "num_channels": len(spec.pixel_mean),
        "image_size": spec.image_size,
        "patch_size": spec.patch_size,
        "hidden_act": "silu",
        "rms_norm_eps": spec.norm_eps,
        "attention_dropout": 0.0,
        "qkv_bias": False,
        "mlp_bias": False,
        "use_head": spec.head,
        "is_native": spec.position == "sincos",
        **({AIMV2_JAX_KEY: {"area": spec.area, "upscale": spec.upscale}} if spec.area is not None else {}),
    }


def text_fields(spec: TextSpec) -> dict[str, Any]:
    """The fields of `Aimv2TextConfig`."""
    return {
        "vocab_size": spec.vocab_size,
        "hidden_size": spec.width,
        "intermediate_size": spec.hidden,
        "num_hidden_layers": spec.depth,
        "num_attention_heads": spec.heads,
        "max_position_embeddings": spec.length,
        "eos_token_id": spec.end_id,
        "hidden_act": "silu",
        "rms_norm_eps": spec.norm_eps,
        "attention_dropout": 0.0,
        "qkv_bias": False,
        "mlp_bias": False,
    }


def dual_fields(weights: LazyWeights[DualEncoderSpec], dtype: str) -> dict[str, Any]:
    """The fields of `Aimv2Config` beside those of its towers. A sigmoid loss's bias, which it lacks, is a field too."""
    fields: dict[str, Any] = {"projection_dim": weights.spec.embed_dim, "max_logit_scale": MAX_LOGIT_SCALE}
    if "logit_bias" not in weights.shapes:
        return fields
    bias = cast(weights.read(["logit_bias"])["logit_bias"], dtype)
    return fields | {AIMV2_JAX_KEY: {"logit_bias": float(bias)}}


def processor_json(spec: EncoderSpec) -> dict[str, Any]:
    """The fields of the image processor: the steps of `geometry.center_view`, or no resizing at native resolution."""
    fixed, side = spec.area is None, spec.image_size
    return {
        "image_processor_type": "CLIPImageProcessor",
        "do_convert_rgb": True,
        "do_resize": fixed,
        "size": {"shortest_edge": side},
        "resample": _BICUBIC,
        "do_center_crop": fixed,
        "crop_size": {"height": side, "width": side},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(spec.pixel_mean),
        "image_std": list(spec.pixel_std),
    }


def write_json(path: Path, tree: dict[str, Any]) -> None:
    """Writes `tree` as an indented JSON file."""
    path.write_text(json.dumps(tree, indent=2) + "\n", encoding="utf-8")
