"""Writes the folder of a Hugging Face `Aimv2VisionModel` or, with a text tower, of an `Aimv2Model`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from aimv2_jax.export.folder import dual_fields, text_fields, vision_fields, write_files, write_json
from aimv2_jax.pretrained.dual_encoder_spec import DualEncoderSpec, TextSpec
from aimv2_jax.pretrained.lazy_weights import LazyWeights
from aimv2_jax.pretrained.tokenizer_file import JSON, tokenizer_name

_TOKENIZER_CONFIG = "tokenizer_config.json"


def write_folder(folder: Path, weights: LazyWeights, dtype: str, max_file_bytes: int) -> None:
    """Writes tensors as `dtype` in files of at most `max_file_bytes`, config, processor, tokenizer and model card."""
    write_files(folder, weights, "hf", dtype, max_file_bytes, config_json(weights, dtype))
    if weights.tokenizer is not None and tokenizer_name(weights.tokenizer) == JSON:
        write_json(folder / _TOKENIZER_CONFIG, tokenizer_config(weights.tokenizer, weights.spec.text))


def config_json(weights: LazyWeights, dtype: str) -> dict[str, Any]:
    """The fields of `Aimv2VisionConfig`, or of `Aimv2Config`."""
    vision = {"model_type": "aimv2_vision_model", **vision_fields(weights.image)}
    if not isinstance(weights.spec, DualEncoderSpec):
        return {"architectures": ["Aimv2VisionModel"], "dtype": dtype, **vision}
    text = {"model_type": "aimv2_text_model", **text_fields(weights.spec.text)}
    fields = {"architectures": ["Aimv2Model"], "model_type": "aimv2", "dtype": dtype, **dual_fields(weights, dtype)}
    return fields | {"vision_config": vision, "text_config": text}


def tokenizer_config(tokenizer: Path, spec: TextSpec) -> dict[str, Any]:
    """What `AutoTokenizer` needs beside `tokenizer.json`: the end token, which is the padding too, and the length."""
    added = json.loads(tokenizer.read_bytes()).get("added_tokens", [])
    end = next((token["content"] for token in added if token["id"] == spec.end_id), None)
    fields = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": spec.length}
    return fields if end is None else fields | {"eos_token": end, "pad_token": end}
