"""Writes the folder of a model under the names of Apple's released files, which timm and Apple's ml-aim load."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from aimv2_jax.export.folder import dual_fields, text_fields, vision_fields, write_files
from aimv2_jax.export.timm_config import timm_fields
from aimv2_jax.pretrained.dual_encoder_spec import DualEncoderSpec
from aimv2_jax.pretrained.lazy_weights import LazyWeights


def write_folder(folder: Path, weights: LazyWeights, dtype: str) -> None:
    """Writes tensors as `dtype` in one file, with config, image processor, tokenizer and model card."""
    write_files(folder, weights, "apple", dtype, math.inf, config_json(weights, dtype))


def config_json(weights: LazyWeights, dtype: str) -> dict[str, Any]:
    """Sizes under Apple's and Hugging Face's keys, and what timm reads of a folder.

    It names no class of transformers: none of them knows these tensors, and they would start from random ones.
    """
    if isinstance(weights.spec, DualEncoderSpec):
        towers = {"vision_config": vision_fields(weights.image), "text_config": text_fields(weights.spec.text)}
        return dual_fields(weights, dtype) | towers
    return vision_fields(weights.spec) | timm_fields(weights.spec)
