"""Byte tokenizer for drills and tests, without the slow import of tensorflow."""

from __future__ import annotations

from pathlib import Path

# Content of a sitecustomize.py, which Python imports at start from a folder of PYTHONPATH.
SITE = f"""
import sys
sys.path.append({str(Path(__file__).resolve().parents[2])!r})
from tests.helpers import bytes_tokenizer
bytes_tokenizer.replace_tokenizer()
"""


class BytesTokenizer:
    """Replacement of `aimv2_jax.data.tokenizer.Tokenizer`, with a constant digest instead of a file's."""

    digest = "bytes"

    def __init__(
        self, path: str, length: int, vocab_size: int = 256, needs_end: bool = False, always_end: bool = False
    ):
        self._length = length
        self._max_pieces = length - always_end  # The end is the padding's 0.

    def batch_arrays(self, captions):
        import numpy as np

        tokens = np.zeros((len(captions), self._length), np.int32)
        valid = np.zeros(tokens.shape, bool)
        for row, caption in enumerate(captions):
            text = caption[: self._max_pieces]
            tokens[row, : len(text)] = np.frombuffer(text, np.uint8)
            valid[row, : len(text)] = True
        truncated = np.array([len(caption) > self._max_pieces for caption in captions], bool)
        return {"tokens": tokens, "token_valid": valid, "truncated": truncated}


def replace_tokenizer() -> None:
    """Installs `BytesTokenizer` as the tokenizer of this process."""
    from aimv2_jax.data import tokenizer

    tokenizer.Tokenizer = BytesTokenizer
    tokenizer.load_tokenizer = lambda config: BytesTokenizer(
        "", config.text.text_length, always_end=config.task == "lit"
    )
