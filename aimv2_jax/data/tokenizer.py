"""Tokenizer: tensorflow-text's SentencePiece, in batches, in the main process only.

B batch, T text tokens.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import tempfile
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import sentencepiece
from jaxtyping import Bool, Int32

from aimv2_jax.errors import UserError
from aimv2_jax.storage.paths import resolve_path
from aimv2_jax.untrusted import read_file

_MAX_MODEL_BYTES = 256 << 20  # A SentencePiece model with a million pieces has about 20 MiB.


class Tokenizer:
    """A SentencePiece model.

    Args:
      path: the `.model` file; `package:` paths are inside the installed package.
      length: T, including the end of a caption.
      vocab_size: rows of the model's token table, at least the number of pieces in the file.
      needs_end: whether the end of text is a target: then the file must have an end id, and only a complete text is
        followed by it.

    Raises:
      UserError: if the file is missing, not SentencePiece, has too many pieces, or lacks a required end id.
    """

    def __init__(self, path: str, length: int, vocab_size: int, needs_end: bool = True):
        self.length = length
        self._max_pieces = length if needs_end else length - 1
        model, self._pieces = _read_model(path)
        self.digest = hashlib.sha256(model).hexdigest()
        """SHA-256 of the file."""
        self.num_pieces = self._pieces.get_piece_size()
        if self.num_pieces > vocab_size:
            raise UserError(
                f"the tokenizer has {self.num_pieces} pieces, more than model.decoder.vocab_size",
                vocab_size,
                f"Set model.decoder.vocab_size to at least {self.num_pieces}, or choose another tokenizer.path",
            )
        eos_id, pad_id, unk_id = self._pieces.eos_id(), self._pieces.pad_id(), self._pieces.unk_id()
        if needs_end and eos_id < 0:
            raise UserError(
                "the tokenizer has no end id, which loss.predict_eos needs",
                path,
                "Choose a tokenizer that was trained with an end id, or set loss.predict_eos=False",
            )
        self.eos_id: int | None = eos_id if eos_id >= 0 else None
        self.unk_id: int | None = unk_id if unk_id >= 0 else None
        self.pad_id: int = next((i for i in (pad_id, eos_id) if i >= 0), 0)
        self._splitter = _tensorflow_splitter(model)

    def encode(self, captions: Sequence[bytes]) -> tuple[Int32[np.ndarray, "B T"], Bool[np.ndarray, "B T"]]:
        """`tokens` and `token_valid` of captions in UTF-8, see `batch_arrays`."""
        arrays = self.batch_arrays(captions)
        return arrays["tokens"], arrays["token_valid"]

    def batch_arrays(self, captions: Sequence[bytes]) -> dict[str, np.ndarray]:
        """Arrays of captions in UTF-8: `tokens`, `token_valid` (True on the text's pieces), `truncated`.

        A caption's pieces are followed by the end id (if the model has one) and padding. If the end is a target, the
        sequence is cut to T: a text that does not fit has no end id, so that a model does not learn to stop in the
        middle of texts. Otherwise pieces are cut to T - 1, as the reference does.
        """
        shape = len(captions), self.length
        tokens = np.full(shape, self.pad_id, np.int32)
        if not captions:
            return {"tokens": tokens, "token_valid": np.zeros(shape, bool), "truncated": np.zeros(0, bool)}
        pieces = self._splitter(list(captions))
        values, splits = pieces.values.numpy(), pieces.row_splits.numpy()
        lengths = np.minimum(np.diff(splits), self._max_pieces)
        column = np.arange(self.length)
        token_valid = column < lengths[:, None]
        tokens[token_valid] = values[(splits[:-1, None] + column)[token_valid]]
        if self.eos_id is not None:
            tokens[column == lengths[:, None]] = self.eos_id
        return {"tokens": tokens, "token_valid": token_valid, "truncated": np.diff(splits) > lengths}

    def decode(self, ids: Sequence[int] | Int32[np.ndarray, " T"]) -> str:
        """The text of `ids` up to the first end or padding id."""
        stops = {self.pad_id, self.eos_id}
        ids = [int(i) for i in ids]
        return self._pieces.decode(ids[: next((n for n, i in enumerate(ids) if i in stops), len(ids))])


def _read_model(path: str) -> tuple[bytes, sentencepiece.SentencePieceProcessor]:
    file = resolve_path(path)
    if not path or not file.is_file():
        raise UserError("config tokenizer.path: no such file", path, "Give a SentencePiece .model file")
    try:
        model = read_file(file, _MAX_MODEL_BYTES)
    except ValueError as error:
        remedy = "Give a SentencePiece .model file"
        raise UserError(f"config tokenizer.path: not a SentencePiece model, {error}", path, remedy) from error
    pieces = sentencepiece.SentencePieceProcessor()
    try:
        pieces.LoadFromSerializedProto(model)
        usable = pieces.get_piece_size() > 0
    except RuntimeError:
        usable = False
    if not usable:
        raise UserError("config tokenizer.path: not a SentencePiece model", path, "Give a SentencePiece .model file")
    return model, pieces


def _tensorflow_splitter(model: bytes) -> Any:
    """A function from a list of byte strings to the ragged tensor of their piece ids."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    with _silence_stderr():
        import tensorflow as tf
        import tensorflow_text

        tf.config.set_visible_devices([], "GPU")  # JAX owns the GPUs.
        tokenizer = tensorflow_text.SentencepieceTokenizer(model=model, out_type=tf.int32)
        tokenizer.tokenize([b""])
    return tokenizer.tokenize


@contextlib.contextmanager
def _silence_stderr() -> Iterator[None]:
    """Discards what tensorflow's C++ code writes to stderr while it loads, before its log level takes effect."""
    with tempfile.TemporaryFile() as sink:
        stderr = os.dup(2)
        os.dup2(sink.fileno(), 2)
        try:
            yield
        finally:
            os.dup2(stderr, 2)
            os.close(stderr)
