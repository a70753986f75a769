"""The tokenizer's file in the folder of an export or of a Hugging Face model."""

from __future__ import annotations

from pathlib import Path

from aimv2_jax.data.sentencepiece_model import SentencePieceModel
from aimv2_jax.data.tokenizer import kind_of
from aimv2_jax.data.tokenizer_json import TokenizerJson
from aimv2_jax.pretrained.safetensors_io import check_inside

SENTENCEPIECE, JSON = SentencePieceModel.file_name, TokenizerJson.file_name


def tokenizer_beside(folder: Path) -> Path | None:
    """The tokenizer's file in `folder`; raises `UserError` for a link out of it."""
    file = next((folder / name for name in (JSON, SENTENCEPIECE) if (folder / name).is_file()), None)
    if file is not None:
        check_inside(file, folder)
    return file


def tokenizer_name(file: Path) -> str:
    """The usual name of a tokenizer's file, by its content."""
    return kind_of(file.read_bytes()).file_name


def copy_tokenizer(file: Path, folder: Path) -> None:
    """Copies a tokenizer's file to `folder`, under its usual name."""
    (folder / tokenizer_name(file)).write_bytes(file.read_bytes())
