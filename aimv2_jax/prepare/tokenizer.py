"""Deterministic training of a SentencePiece model on captions of prepared datasets, in bounded memory; CLIP's BPE."""

from __future__ import annotations

import argparse
import io
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal

import sentencepiece

from aimv2_jax.cli import Parser, check_output, positive
from aimv2_jax.data import records
from aimv2_jax.data.records import BadRecord
from aimv2_jax.data.sampling.counter_rng import hash32, permute_index
from aimv2_jax.data.sources import Source
from aimv2_jax.data.transforms import captions
from aimv2_jax.errors import EXIT_FINISHED, UserError, cli_main
from aimv2_jax.prepare.clip_tokenizer import VOCABULARY, clip_tokenizer, read_merges
from aimv2_jax.storage.files import atomic_write
from aimv2_jax.untrusted import printable

PAD_ID, END_ID, UNKNOWN_ID = 0, 1, 2
MODEL_TYPES = ("bpe", "unigram")
MAX_CAPTIONS = 1_000_000  # About 100 MB of text, all in memory; more text changes few pieces.

_MAX_CAPTION_LENGTH = 1000  # Characters of at most 4 bytes each; SentencePiece skips lines of more than 4192 bytes.
_TOO_HIGH = re.compile(r"Please set it to a value <= (\d+)")
_TOO_LOW = re.compile(r"smaller than required_chars. \d+ vs (\d+)")

_DESCRIPTION = """\
Makes a tokenizer.

    python -m aimv2_jax.prepare.tokenizer train --input DIR ... --vocab-size N --output FILE.model
    python -m aimv2_jax.prepare.tokenizer clip --vocabulary open_clip_torch-3.3.0-py3-none-any.whl --output FILE.json
"""
_TRAIN_DESCRIPTION = f"""\
Trains a SentencePiece model on the cleaned captions of prepared datasets; pad {PAD_ID}, end {END_ID}, unknown
{UNKNOWN_ID}, no begin token. The same input and flags give the same file. To use it, set tokenizer.path to the file and
model.decoder.vocab_size to at least its number of pieces.
"""
_CLIP_DESCRIPTION = """\
Writes CLIP's tokenizer, with the ids of OpenAI's models, as a tokenizer.json. Its vocabulary (MIT licence) is in the
wheel of open-clip-torch, which need not be installed:

    pip download open-clip-torch --no-deps
"""


def train_model(
    texts: Sequence[str],
    vocab_size: int,
    model_type: Literal["bpe", "unigram"] = "bpe",
    byte_fallback: bool = True,
    character_coverage: float = 1.0,
) -> bytes:
    """Trains a SentencePiece model of `vocab_size` pieces, in one thread so that floats are added in a fixed order.

    Raises:
      UserError: if the texts have too few pieces for `vocab_size`, or more characters than fit in it.
    """
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(texts),
            model_writer=model,
            vocab_size=vocab_size,
            model_type=model_type,
            byte_fallback=byte_fallback,
            character_coverage=character_coverage,
            pad_id=PAD_ID,
            eos_id=END_ID,
            unk_id=UNKNOWN_ID,
            bos_id=-1,
            num_threads=1,
            minloglevel=2,
        )
    except RuntimeError as error:
        raise _training_error(str(error), vocab_size, len(texts)) from error
    return model.getvalue()


def _training_error(message: str, vocab_size: int, count: int) -> UserError:
    if match := _TOO_HIGH.search(message):
        what = f"the vocabulary is too large for {count:,} captions"
        return UserError(what, vocab_size, f"Give --vocab-size {match[1]} or less, or more captions")
    if match := _TOO_LOW.search(message):
        what = f"the vocabulary is too small for the {int(match[1]):,} bytes, characters and special pieces"
        return UserError(what, vocab_size, f"Give --vocab-size {match[1]} or more, or a lower --character-coverage")
    return UserError(f"SentencePiece cannot train on these {count:,} captions", message, "Give other captions")


def sample_captions(
    sources: Sequence[Source], kinds: Sequence[str] | None = None, limit: int = MAX_CAPTIONS, seed: int = 0
) -> tuple[list[str], int]:
    """Samples at most `limit` cleaned captions of `kinds` (default: all); also counts unusable records and captions.

    The sources share the limit evenly; if one has too few captions, the others provide more. The records of a source
    are a function of `seed` and its index; only these records are read, in order.
    """
    used_kinds = {source.name: [kind for kind in kinds or source.kinds if source.kinds.get(kind)] for source in sources}
    # Assumes that every record has every kind; reading finds out which captions are missing.
    sizes = [sum(max(len(source), source.kinds[kind]) for kind in used_kinds[source.name]) for source in sources]
    shares = _shares(sizes, limit)
    texts: list[str] = []
    unusable = 0
    for source_index, (source, size, share) in enumerate(zip(sources, sizes, shares)):
        count = -(-share * len(source) // max(1, size))
        source_texts: list[str] = []
        for index in _sample_indices(len(source), count, hash32(seed, "tokenizer", source_index)):
            try:
                record = records.decode(source.read(index))
            except BadRecord:
                unusable += 1
                continue
            for text in (text for kind in used_kinds[source.name] for text in record.texts(kind)):
                try:
                    source_texts.append(captions.clean(text)[:_MAX_CAPTION_LENGTH])
                except BadRecord:
                    unusable += 1
        texts += source_texts[:share]
    return texts, unusable


def _shares(sizes: Sequence[int], limit: int) -> list[int]:
    """Splits at most `limit` evenly over sources of these `sizes`; a remainder goes to the first sources."""
    shares = [0] * len(sizes)
    left = min(limit, sum(sizes))
    while left:
        unfilled = [i for i, size in enumerate(sizes) if shares[i] < size]
        share, remainder = divmod(left, len(unfilled))
        for rank, i in enumerate(unfilled):
            more = min(share + (rank < remainder), sizes[i] - shares[i])
            shares[i] += more
            left -= more
    return shares


def _sample_indices(size: int, count: int, seed: int) -> Iterator[int]:
    """Chooses `count` of `size` indices by `seed`, in ascending order."""
    if count >= size:
        return iter(range(size))
    return iter(sorted(permute_index(i, size, seed) for i in range(count)))


def _open(folders: Sequence[str], kinds: Sequence[str] | None) -> list[Source]:
    sources = [Source(str(index), folder, what="--input") for index, folder in enumerate(folders)]
    for folder, source in zip(folders, sources):
        if not any(source.kinds.get(kind) for kind in kinds or source.kinds):
            existing = printable(", ".join(source.kinds)) or "none"
            raise UserError(f"--input {folder} has no captions of --kind", kinds or "any", f"Its kinds: {existing}")
    return sources


def _coverage(text: str) -> float:
    if not re.fullmatch(r"0\.\d+|1(\.0*)?", text) or float(text) < 0.98:  # SentencePiece has the same bound.
        raise argparse.ArgumentTypeError(f"{text!r} is not a number from 0.98 to 1")
    return float(text)


def _parser() -> Parser:
    parser = Parser(prog="python -m aimv2_jax.prepare.tokenizer", description=_DESCRIPTION)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    train = commands.add_parser(
        "train", help="train a SentencePiece model on captions of prepared datasets", description=_TRAIN_DESCRIPTION
    )
    train.add_argument("--input", nargs="+", required=True, metavar="DIR", help="folders of prepared datasets")
    train.add_argument("--vocab-size", type=positive, required=True, metavar="N", help="number of pieces of the model")
    train.add_argument("--output", type=Path, required=True, metavar="FILE.model", help="file to write")
    train.add_argument("--kind", nargs="+", metavar="KIND", help="caption kinds to use (default: all)")
    train.add_argument("--model-type", choices=MODEL_TYPES, default="bpe", help="default: bpe")
    train.add_argument(
        "--max-captions",
        type=positive,
        default=MAX_CAPTIONS,
        metavar="N",
        help=f"number of captions to train on, in equal shares from the datasets (default: {MAX_CAPTIONS:,})",
    )
    train.add_argument("--seed", type=int, default=0, metavar="N", help="seed of the caption sample (default: 0)")
    train.add_argument(
        "--character-coverage",
        type=_coverage,
        default=0.9995,
        metavar="SHARE",
        help="share of the text's characters that get their own pieces; 0.98 to 1 (default: 0.9995)",
    )
    train.add_argument(
        "--no-byte-fallback", action="store_true", help="encode rare characters as unknown, not as bytes"
    )
    train.add_argument("--overwrite", action="store_true", help="replace FILE.model")
    clip = commands.add_parser("clip", help="write CLIP's tokenizer as a tokenizer.json", description=_CLIP_DESCRIPTION)
    clip.add_argument(
        "--vocabulary", type=Path, required=True, metavar="FILE", help=f"wheel of open-clip-torch, or its {VOCABULARY}"
    )
    clip.add_argument("--output", type=Path, required=True, metavar="FILE.json", help="file to write")
    clip.add_argument("--overwrite", action="store_true", help="replace FILE.json")
    return parser


@cli_main
def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command `python -m aimv2_jax.prepare.tokenizer`."""
    args = _parser().parse_args(arguments)
    check_output(args.output)
    if args.output.exists() and not args.overwrite:
        raise UserError("--output already exists", str(args.output), "Give another file, or --overwrite")
    (_train if args.command == "train" else _write_clip)(args)
    return EXIT_FINISHED


def _train(args: argparse.Namespace) -> None:
    sources = _open(args.input, args.kind)
    texts, unusable = sample_captions(sources, args.kind, args.max_captions, args.seed)
    if not texts:
        raise UserError("--input has no usable caption", args.input, "Prepare the datasets again")
    model = train_model(texts, args.vocab_size, args.model_type, not args.no_byte_fallback, args.character_coverage)
    atomic_write(args.output, model)
    left_out = f" ({unusable:,} unusable left out)" if unusable else ""
    print(
        f"{args.output}: {args.vocab_size:,} pieces from {len(texts):,} captions of {len(sources)} datasets{left_out}"
    )


def _write_clip(args: argparse.Namespace) -> None:
    tokenizer = clip_tokenizer(read_merges(args.vocabulary))
    atomic_write(args.output, tokenizer.to_str(pretty=True).encode())
    print(f"{args.output}: {tokenizer.get_vocab_size():,} pieces")


if __name__ == "__main__":
    sys.exit(main())
