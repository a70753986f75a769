"""Writes a Hugging Face `Aimv2VisionModel` folder with image processor and model card."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from aimv2_jax.export.model_card import model_card
from aimv2_jax.pretrained import param_names
from aimv2_jax.pretrained.encoder_spec import EncoderSpec
from aimv2_jax.pretrained.hf_import import AIMV2_JAX_KEY, CONFIG, PROCESSOR
from aimv2_jax.pretrained.lazy_weights import LazyWeights
from aimv2_jax.pretrained.safetensors_io import write_tensors

CARD = "README.md"
_DTYPES = {"float32": np.dtype(np.float32), "float16": np.dtype(np.float16), "bfloat16": np.dtype(ml_dtypes.bfloat16)}
_BICUBIC = 3  # Pillow's value.


def cast(array: np.ndarray, dtype: str) -> np.ndarray:
    """`array` as `dtype`, rounded to nearest."""
    return array.astype(_DTYPES[dtype])


def write_folder(folder: Path, weights: LazyWeights, dtype: str, max_file_bytes: int) -> None:
    """Writes tensors as `dtype` in files of at most `max_file_bytes`, with config, image processor and model card."""
    spec = weights.spec
    tree = {path: cast(leaf, dtype) for path, leaf in weights.read().items()}
    shapes = param_names.expected("hf", weights.shapes, spec.depth)
    sizes = {name: math.prod(shape) * _DTYPES[dtype].itemsize for name, shape in shapes.items()}
    write_tensors(folder, param_names.to_hf(tree), sizes, max_file_bytes)
    _write_json(folder / CONFIG, config_json(spec, dtype))
    _write_json(folder / PROCESSOR, processor_json(spec))
    (folder / CARD).write_text(model_card(weights, dtype, len(sizes)), encoding="utf-8")


def config_json(spec: EncoderSpec, dtype: str) -> dict[str, Any]:
    """The fields of `Aimv2VisionConfig`."""
    return {
        "architectures": ["Aimv2VisionModel"],
        "model_type": "aimv2_vision_model",
        "dtype": dtype,
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


def _write_json(path: Path, tree: dict[str, Any]) -> None:
    path.write_text(json.dumps(tree, indent=2) + "\n", encoding="utf-8")
