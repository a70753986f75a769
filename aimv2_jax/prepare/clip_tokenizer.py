"""CLIP's byte-level BPE as a `tokenizer.json`, from the vocabulary that OpenAI released."""

from __future__ import annotations

import gzip
import io
import zipfile
import zlib
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from aimv2_jax.errors import UserError
from aimv2_jax.untrusted import read_file

VOCABULARY = "bpe_simple_vocab_16e6.txt.gz"
NUM_MERGES = 48_894  # Merges that CLIP uses, of 262,144 in the file: 49,408 ids less 512 bytes and 2 special tokens.
START, END = "<|startoftext|>", "<|endoftext|>"

_END_OF_WORD = "</w>"
_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
_MAX_BYTES = 64 << 20  # The wheel has 1.5 MB, the text of its vocabulary 3 MB.
_REMEDY = f"Give the wheel of open-clip-torch, or the {VOCABULARY} in it"


def clip_tokenizer(merges: list[tuple[str, str]]) -> Tokenizer:
    """A tokenizer with CLIP's rules: lower case, words by its pattern, bytes as letters, `merges` in order of rank.

    Ids are those of the 256 bytes, of the 256 bytes at the end of a word, of the merges, the start and the end.
    """
    alphabet = _byte_letters()
    tokens = [*alphabet, *(letter + _END_OF_WORD for letter in alphabet), *map("".join, merges), START, END]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, end_of_word_suffix=_END_OF_WORD))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_WORDS), "removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    ends = [(token, vocabulary[token]) for token in (START, END)]
    tokenizer.post_processor = processors.TemplateProcessing(single=f"{START} $A {END}", special_tokens=ends)
    # A space follows each word but the last.
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.ByteLevel(),
            decoders.Replace(Regex(_END_OF_WORD + r"\z"), ""),
            decoders.Replace(_END_OF_WORD, " "),
        ]
    )
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in (START, END)])
    return tokenizer


def read_merges(file: Path) -> list[tuple[str, str]]:
    """The merges that CLIP uses, from a wheel of open-clip-torch or the vocabulary file in it.

    Raises:
      UserError: for any other file.
    """
    try:
        packed = read_file(file, _MAX_BYTES)
        if zipfile.is_zipfile(io.BytesIO(packed)):
            packed = _from_wheel(packed)
        with gzip.open(io.BytesIO(packed)) as stream:
            lines = _read_bounded(stream).decode().split("\n")
    except (ValueError, OSError, EOFError, zlib.error, zipfile.BadZipFile, NotImplementedError, RuntimeError) as error:
        raise UserError(f"--vocabulary cannot be read, {error}", str(file), _REMEDY) from error
    # The first line is a title.
    merges = [tuple(line.split()) for line in lines[1 : NUM_MERGES + 1]]
    if len(merges) < NUM_MERGES or any(len(merge) != 2 for merge in merges):
        raise UserError(f"--vocabulary has no {NUM_MERGES:,} lines of two pieces", str(file), _REMEDY)
    return merges


def _from_wheel(packed: bytes) -> bytes:
    with zipfile.ZipFile(io.BytesIO(packed)) as wheel:
        name = next((name for name in wheel.namelist() if name.rpartition("/")[2] == VOCABULARY), None)
        if name is None:
            raise ValueError(f"there is no {VOCABULARY} in it")
        with wheel.open(name) as stream:
            return _read_bounded(stream)


def _read_bounded(stream: io.BufferedIOBase) -> bytes:
    content = stream.read(_MAX_BYTES + 1)
    if len(content) > _MAX_BYTES:
        raise ValueError(f"its content has more than {_MAX_BYTES:,} bytes")
    return content


def _byte_letters() -> list[str]:
    """A printable letter for each byte, in the order of CLIP's ids: printable bytes first, then the others."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    return [chr(byte) for byte in printable] + [chr(256 + index) for index in range(256 - len(printable))]
