"""A folder that Hugging Face's `transformers` reads as `Aimv2VisionModel`, with image processor and model card."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from aimv2_jax.export import names
from aimv2_jax.export.card import model_card
from aimv2_jax.export.reading import CONFIG, OURS, PROCESSOR
from aimv2_jax.export.tensors import write_tensors
from aimv2_jax.export.vision import Vision
from aimv2_jax.export.weights import Weights

CARD = "README.md"
_TYPES = {"float32": np.dtype(np.float32), "float16": np.dtype(np.float16), "bfloat16": np.dtype(ml_dtypes.bfloat16)}
_BICUBIC = 3  # Pillow's number.


def as_type(array: np.ndarray, dtype: str) -> np.ndarray:
    """`array` as the type of that name, rounded to nearest."""
    return array.astype(_TYPES[dtype])


def write_folder(folder: Path, weights: Weights, dtype: str, most_bytes: int) -> None:
    """Writes tensors as `dtype`, in files of at most `most_bytes`, and all that belongs to them."""
    vision = weights.vision
    tree = {path: as_type(leaf, dtype) for path, leaf in weights.read().items()}
    shapes = names.expected("hf", weights.shapes, vision.depth)
    sizes = {name: math.prod(shape) * _TYPES[dtype].itemsize for name, shape in shapes.items()}
    write_tensors(folder, names.to_hf(tree), sizes, most_bytes)
    _write_json(folder / CONFIG, config_json(vision, dtype))
    _write_json(folder / PROCESSOR, processor_json(vision))
    (folder / CARD).write_text(model_card(weights, dtype, len(sizes)), encoding="utf-8")


def config_json(vision: Vision, dtype: str) -> dict[str, Any]:
    """What `Aimv2VisionConfig` reads."""
    return {
        "architectures": ["Aimv2VisionModel"],
        "model_type": "aimv2_vision_model",
        "dtype": dtype,
        "hidden_size": vision.width,
        "intermediate_size": vision.hidden,
        "num_hidden_layers": vision.depth,
        "num_attention_heads": vision.heads,
        "num_channels": len(vision.pixel_mean),
        "image_size": vision.image_size,
        "patch_size": vision.patch_size,
        "hidden_act": "silu",
        "rms_norm_eps": vision.norm_eps,
        "attention_dropout": 0.0,
        "qkv_bias": False,
        "mlp_bias": False,
        "use_head": vision.head,
        "is_native": vision.position == "sincos",
        **({OURS: {"area": vision.area, "upscale": vision.upscale}} if vision.area is not None else {}),
    }


def processor_json(vision: Vision) -> dict[str, Any]:
    """What `AutoImageProcessor` reads: the steps of `transforms.center_view`; at native resolution neither of them."""
    fixed, side = vision.area is None, vision.image_size
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
        "image_mean": list(vision.pixel_mean),
        "image_std": list(vision.pixel_std),
    }


def _write_json(path: Path, tree: dict[str, Any]) -> None:
    path.write_text(json.dumps(tree, indent=2) + "\n", encoding="utf-8")
