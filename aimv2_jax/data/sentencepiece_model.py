"""SentencePiece models: pieces of captions by tensorflow-text."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence

import numpy as np
import sentencepiece
from jaxtyping import Int

from aimv2_jax.console import silence_stderr


class SentencePieceModel:
    """A SentencePiece model, with the attributes and methods of `TokenizerJson`.

    Args:
      content: the content of the `.model` file.

    Raises:
      ValueError: if it is no SentencePiece model.
    """

    file_name = "tokenizer.model"
    start_ids: tuple[int, ...] = ()

    def __init__(self, content: bytes):
        self._content = content
        self._pieces = sentencepiece.SentencePieceProcessor()
        try:
            self._pieces.LoadFromSerializedProto(content)
            self.num_pieces = self._pieces.get_piece_size()
        except RuntimeError as error:
            raise ValueError("it is no SentencePiece model") from error
        if not self.num_pieces:
            raise ValueError("it has no pieces")
        ids = self._pieces.eos_id(), self._pieces.pad_id(), self._pieces.unk_id()
        self.eos_id, self.pad_id, self.unk_id = (index if index >= 0 else None for index in ids)
        self.end_ids: tuple[int, ...] = () if self.eos_id is None else (self.eos_id,)

    def splitter(self) -> Callable[[Sequence[bytes]], tuple[Int[np.ndarray, " N"], Int[np.ndarray, " S"]]]:
        """Loads tensorflow; the function that it returns is described in `TokenizerJson.splitter`."""
        os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
        with silence_stderr():  # Its C++ code writes there while it loads, before its log level takes effect.
            import tensorflow as tf
            import tensorflow_text

            tf.config.set_visible_devices([], "GPU")  # JAX owns the GPUs.
            tokenizer = tensorflow_text.SentencepieceTokenizer(model=self._content, out_type=tf.int32)
            tokenizer.tokenize([b""])

        def split(captions: Sequence[bytes]) -> tuple[np.ndarray, np.ndarray]:
            pieces = tokenizer.tokenize(list(captions))
            return pieces.values.numpy(), pieces.row_splits.numpy()

        return split

    def join(self, ids: Sequence[int]) -> str:
        """The text of pieces."""
        return self._pieces.decode(list(ids))
