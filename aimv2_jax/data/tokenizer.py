"""Tokenizer: captions to rows of token ids, in batches, in the main process only.

B batch, T text tokens.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, Int32

from aimv2_jax.config.schema import Config
from aimv2_jax.data.sentencepiece_model import SentencePieceModel
from aimv2_jax.data.tokenizer_json import TokenizerJson
from aimv2_jax.errors import UserError
from aimv2_jax.storage.paths import resolve_path
from aimv2_jax.untrusted import read_file

_MAX_BYTES = 256 << 20  # A SentencePiece model with a million pieces has about 20 MiB.
_REMEDY = "Give a SentencePiece .model file or a tokenizer.json"


class Tokenizer:
    """A SentencePiece model or a `tokenizer.json`: the content of the file decides which.

    Args:
      path: the file; `package:` paths are inside the installed package.
      length: T, including the end of a caption.
      vocab_size: rows of the model's token table, at least the number of pieces in the file.
      needs_end: whether the end of text is a target: then the file must have an end id, and only a complete text is
        followed by it.
      always_end: whether rows are sequences for a text tower, whose output is that of the end: what the file puts
        before a text, pieces, and always the end.
      section: the config section with `vocab_size` and `text_length`, for errors.

    Raises:
      UserError: if the file is missing, of neither kind, has too many pieces, or lacks a required end id; for a
        text tower, if the file puts the end id before a text too, or T is too small for a text between the special ids.
    """

    def __init__(
        self,
        path: str,
        length: int,
        vocab_size: int,
        needs_end: bool = True,
        always_end: bool = False,
        section: str = "model.decoder",
    ):
        self.length = length
        content = _read(path)
        self._file = _open(content, path)
        self.digest = hashlib.sha256(content).hexdigest()
        """SHA-256 of the file."""
        self.file_name = self._file.file_name
        """The usual name of a file of this kind."""
        self.num_pieces = self._file.num_pieces
        if self.num_pieces > vocab_size:
            raise UserError(
                f"the tokenizer has {self.num_pieces} pieces, more than {section}.vocab_size",
                vocab_size,
                f"Set {section}.vocab_size to at least {self.num_pieces}, or choose another tokenizer.path",
            )
        self.eos_id: int | None = self._file.eos_id
        self.unk_id: int | None = self._file.unk_id
        self.pad_id: int = next((i for i in (self._file.pad_id, self.eos_id) if i is not None), 0)
        if always_end and self.eos_id is None:
            raise UserError(
                "the tokenizer has no end id, which a text tower needs",
                path,
                "Choose a tokenizer with an end token",
            )
        if needs_end and self.eos_id is None:
            raise UserError(
                "the tokenizer has no end id, which loss.predict_eos needs",
                path,
                "Choose a tokenizer that was trained with an end id, or set loss.predict_eos=False",
            )
        if always_end:
            self._start, self._end = self._file.start_ids, self._file.end_ids
            if self._end[0] in self._start:
                raise UserError(
                    "the tokenizer puts its end token before a text too, and a text tower is read at the first one",
                    path,
                    "Choose a tokenizer with another start token, or with none",
                )
            num_special = len(self._start) + len(self._end)
            self._max_pieces = length - num_special
            if self._max_pieces < 1:
                raise UserError(
                    f"{section}.text_length has no room for a text beside the tokenizer's {num_special} special tokens",
                    length,
                    f"Set {section}.text_length to at least {num_special + 1}",
                )
        else:
            self._start, self._end = (), () if self.eos_id is None else (self.eos_id,)
            self._max_pieces = length if needs_end else length - 1
        self.end_id: int | None = self._end[0] if self._end else None
        """Id of the first token after a text, of which a text tower gives the features."""
        self._split = self._file.splitter()

    def encode(self, captions: Sequence[bytes]) -> tuple[Int32[np.ndarray, "B T"], Bool[np.ndarray, "B T"]]:
        """`tokens` and `token_valid` of captions in UTF-8, see `batch_arrays`."""
        arrays = self.batch_arrays(captions)
        return arrays["tokens"], arrays["token_valid"]

    def batch_arrays(self, captions: Sequence[bytes]) -> dict[str, np.ndarray]:
        """Arrays of captions in UTF-8: `tokens`, `token_valid` (True on all before the end), `truncated`.

        A caption's pieces are followed by the end id (if the file has one) and padding. If the end is a target, the
        sequence is cut to T: a text that does not fit has no end id, so that a model does not learn to stop in the
        middle of texts. Otherwise pieces are cut to T - 1, as the reference does. With `always_end`, the file's start
        ids come first, and pieces are cut so that all its end ids follow.
        """
        shape = len(captions), self.length
        tokens = np.full(shape, self.pad_id, np.int32)
        if not captions:
            return {"tokens": tokens, "token_valid": np.zeros(shape, bool), "truncated": np.zeros(0, bool)}
        values, splits = self._split(captions)
        lengths = np.minimum(np.diff(splits), self._max_pieces)
        column = np.arange(self.length) - len(self._start)  # 0 is the first piece.
        token_valid = column < lengths[:, None]
        is_piece = token_valid & (column >= 0)
        tokens[:, : len(self._start)] = self._start
        tokens[is_piece] = values[(splits[:-1, None] + column)[is_piece]]
        for position, end in enumerate(self._end):
            tokens[column == lengths[:, None] + position] = end
        return {"tokens": tokens, "token_valid": token_valid, "truncated": np.diff(splits) > lengths}

    def decode(self, ids: Sequence[int] | Int32[np.ndarray, " T"]) -> str:
        """The text of `ids` up to the first end or padding id."""
        stops = {self.pad_id, self.eos_id}
        ids = [int(i) for i in ids]
        return self._file.join(ids[: next((n for n, i in enumerate(ids) if i in stops), len(ids))])


def load_tokenizer(config: Config) -> Tokenizer:
    """The tokenizer of a run; raises `UserError` as `Tokenizer` does."""
    text, is_tower = config.text, config.task == "lit"
    return Tokenizer(
        config.tokenizer.path,
        text.text_length,
        text.vocab_size,
        needs_end=config.loss.predict_eos and not is_tower,
        always_end=is_tower,
        section="lit.text" if is_tower else "model.decoder",
    )


def kind_of(content: bytes) -> type[SentencePieceModel | TokenizerJson]:
    """The class that reads a tokenizer's file of this content."""
    return TokenizerJson if content.lstrip().startswith(b"{") else SentencePieceModel


def _read(path: str) -> bytes:
    file = resolve_path(path)
    if not path or not file.is_file():
        raise UserError("config tokenizer.path: no such file", path, _REMEDY)
    try:
        return read_file(file, _MAX_BYTES)
    except ValueError as error:
        raise UserError(f"config tokenizer.path: not a tokenizer, {error}", path, _REMEDY) from error


def _open(content: bytes, path: str) -> SentencePieceModel | TokenizerJson:
    kind = kind_of(content)
    try:
        return kind(content)
    except ValueError as error:
        what = "config tokenizer.path: neither a SentencePiece model nor a tokenizer.json"
        if kind is TokenizerJson:
            what = f"config tokenizer.path: not a usable tokenizer.json, {error}"
        raise UserError(what, path, _REMEDY) from error
