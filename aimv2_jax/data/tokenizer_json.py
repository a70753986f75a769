"""Tokenizer files of Hugging Face (`tokenizer.json`): pieces of captions by the `tokenizers` library."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import tokenizers
from jaxtyping import Int

from aimv2_jax.console import silence_stderr
from aimv2_jax.untrusted import MAX_JSON_BYTES, parse_json_object, shorten

# A known letter and an unassigned one: some models cannot encode a letter that they do not know.
_PROBE = "a \U0010ffff"
# Names of the end of text, for files whose post-processor adds none: GPT-2, T5 and Llama 2, Gemma, Llama 3, BERT.
_END_TOKENS = ("<|endoftext|>", "</s>", "<eos>", "[EOS]", "<|end_of_text|>", "[SEP]")
_PAD_TOKENS = ("<pad>", "[PAD]", "<|pad|>")


class TokenizerJson:
    """A `tokenizer.json`.

    Args:
      content: the content of the file.

    Attributes:
      file_name: the usual name of such a file.
      num_pieces: one more than the largest id.
      start_ids: special ids that the file's post-processor puts before a text.
      end_ids: special ids after a text, from the post-processor, else by name; empty if there are none.
      eos_id: the last of `end_ids`, None without.
      pad_id: the padding id of the file, None if it has none.
      unk_id: id of unknown text, None if there is none.

    Raises:
      ValueError: if the library cannot read the file, or cannot encode every text with it.
    """

    file_name = "tokenizer.json"

    def __init__(self, content: bytes):
        if len(content) > MAX_JSON_BYTES:
            raise ValueError(f"it has {len(content):,} bytes, the limit is {MAX_JSON_BYTES:,}")
        tree = parse_json_object(content)
        with _library_errors():
            self._tokenizer = tokenizers.Tokenizer.from_buffer(content)
        model = tree["model"]
        if model.get("dropout"):
            raise ValueError("its BPE dropout makes tokens random")
        padding = self._tokenizer.padding or {}
        self.pad_id: int | None = padding.get("pad_id", self._first_id(_PAD_TOKENS))
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()
        self.start_ids, self.end_ids = self._surrounding_ids()
        self.eos_id = self.end_ids[-1] if self.end_ids else None
        surrounding = {*self.start_ids, *self.end_ids}
        unk_id = self._unknown_id(model)
        self.unk_id = None if unk_id in surrounding else unk_id
        special = {index for index, token in self._tokenizer.get_added_tokens_decoder().items() if token.special}
        self._not_text = np.array(sorted((special | surrounding) - {self.unk_id}), np.int64)
        pads = set() if self.pad_id is None else {self.pad_id}
        self.num_pieces = 1 + max(surrounding | pads | set(self._tokenizer.get_vocab().values()))

    def splitter(self) -> Callable[[Sequence[bytes]], tuple[Int[np.ndarray, " N"], Int[np.ndarray, " S"]]]:
        """A function from captions in UTF-8 to the N pieces of all, and the positions where they are split.

        Caption i has the pieces from split i to split i + 1. Special tokens that a text spells out are left out, so
        that no caption contains the end of text.
        """
        return self._split

    def join(self, ids: Sequence[int]) -> str:
        """The text of pieces, without special tokens."""
        pieces = [index for index in ids if index not in self._not_text]
        return self._tokenizer.decode(pieces, skip_special_tokens=True) if pieces else ""  # Some decoders need a piece.

    def _split(self, captions: Sequence[bytes]) -> tuple[Int[np.ndarray, " N"], Int[np.ndarray, " S"]]:
        texts = [caption.decode(errors="replace") for caption in captions]
        rows = [encoding.ids for encoding in self._tokenizer.encode_batch_fast(texts, add_special_tokens=False)]
        splits = np.cumsum([0, *map(len, rows)])
        values = np.fromiter(itertools.chain.from_iterable(rows), np.int64, count=splits[-1])
        is_text = ~np.isin(values, self._not_text)
        return values[is_text], np.concatenate([[0], np.cumsum(is_text)])[splits]

    def _surrounding_ids(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Special ids before and after a text."""
        with _library_errors():
            encoding = self._tokenizer.encode(_PROBE)
        pieces = [position for position, special in enumerate(encoding.special_tokens_mask) if not special]
        if not pieces:
            raise ValueError("it gives no pieces for the letter a")
        start, end = encoding.ids[: pieces[0]], encoding.ids[pieces[-1] + 1 :]
        named = self._first_id(_END_TOKENS)
        if not end and named is not None:
            end = [named]
        return tuple(start), tuple(end)

    def _unknown_id(self, model: Mapping[str, Any]) -> int | None:
        if isinstance(model.get("unk_token"), str):
            return self._tokenizer.token_to_id(model["unk_token"])
        return model.get("unk_id")  # A unigram model has one; the library has checked it.

    def _first_id(self, names: Sequence[str]) -> int | None:
        """The id of the first of `names` that the file has."""
        ids = (self._tokenizer.token_to_id(name) for name in names)
        return next((index for index in ids if index is not None), None)


@contextlib.contextmanager
def _library_errors() -> Iterator[None]:
    """Raises errors of the library as `ValueError`, without what its Rust code writes to stderr."""
    try:
        with silence_stderr():
            yield
    except BaseException as error:
        # A panic of Rust code is not an Exception, and its class cannot be imported.
        if isinstance(error, Exception) or type(error).__name__ == "PanicException":
            raise ValueError(f"the tokenizers library refuses it ({shorten(str(error))})") from error
        raise
