"""Trains a SentencePiece model on captions of prepared data sets, in bounded memory; two runs give the same file."""

from __future__ import annotations

import argparse
import io
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal

import sentencepiece

from aimv2_jax.data import captions, records
from aimv2_jax.data.chance import hash32, shuffled
from aimv2_jax.data.records import BadRecord
from aimv2_jax.data.sources import Source
from aimv2_jax.errors import EXIT_FINISHED, UserError, reports_user_errors
from aimv2_jax.files import write_whole
from aimv2_jax.flags import Parser, check_output, positive
from aimv2_jax.untrusted import printable

PAD_ID, END_ID, UNKNOWN_ID = 0, 1, 2
MODEL_TYPES = ("bpe", "unigram")
MAX_CAPTIONS = 1_000_000  # Some 100 MB of text: more changes few pieces, and SentencePiece holds all of it at once.

_LONGEST = 1000  # Letters. SentencePiece leaves out lines of more than 4192 bytes; a letter has four at most.
_TOO_HIGH = re.compile(r"Please set it to a value <= (\d+)")
_TOO_LOW = re.compile(r"smaller than required_chars. \d+ vs (\d+)")

_DESCRIPTION = """\
The tokenizer's command.

    python -m aimv2_jax.data.tokenizer train --input DIR ... --vocab-size N --output FILE.model
"""
_TRAIN_DESCRIPTION = f"""\
Trains a SentencePiece model on the cleaned captions of prepared data sets; pad {PAD_ID}, end {END_ID}, unknown
{UNKNOWN_ID}, no begin. Same input and flags, same file. To use it, set tokenizer.path to the file, and
model.decoder.vocab_size to at least its pieces.
"""


def train_model(
    texts: Sequence[str],
    vocab_size: int,
    model_type: Literal["bpe", "unigram"] = "bpe",
    byte_fallback: bool = True,
    character_coverage: float = 1.0,
) -> bytes:
    """A SentencePiece model of `vocab_size` pieces; one thread, since more would add floats in another order.

    Raises:
      UserError: if the texts have too few pieces for `vocab_size`, or more letters than it has room for.
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
        raise _refused(str(error), vocab_size, len(texts)) from error
    return model.getvalue()


def _refused(message: str, vocab_size: int, count: int) -> UserError:
    if most := _TOO_HIGH.search(message):
        what = f"the vocabulary is too large for {count:,} captions"
        return UserError(what, vocab_size, f"Give --vocab-size {most[1]} or less, or more captions")
    if least := _TOO_LOW.search(message):
        what = f"the vocabulary has no room for the {int(least[1]):,} bytes, letters and special pieces"
        return UserError(what, vocab_size, f"Give --vocab-size {least[1]} or more, or a lower --character-coverage")
    return UserError(f"SentencePiece cannot train on these {count:,} captions", message, "Give other captions")


def sample_captions(
    sources: Sequence[Source], kinds: Sequence[str] | None = None, limit: int = MAX_CAPTIONS, seed: int = 0
) -> tuple[list[str], int]:
    """At most `limit` cleaned captions (of all kinds, or of `kinds`), and how many records or captions were unusable.

    The sources share the limit evenly; what one has too few, the others give. Which records a source gives is a
    function of `seed` and its place; they are read in order, and no other record is.
    """
    asked = {source.name: [kind for kind in kinds or source.kinds if source.kinds.get(kind)] for source in sources}
    # A kind that some records lack is taken for whole: what is missing is found out by reading.
    sizes = [sum(max(len(source), source.kinds[kind]) for kind in asked[source.name]) for source in sources]
    wanted = _shares(sizes, limit)
    texts: list[str] = []
    unusable = 0
    for place, (source, size, share) in enumerate(zip(sources, sizes, wanted)):
        mine = asked[source.name]
        count = -(-share * len(source) // max(1, size))
        found: list[str] = []
        for index in _chosen(len(source), count, hash32(seed, "tokenizer", place)):
            try:
                record = records.decode(source.read(index))
            except BadRecord:
                unusable += 1
                continue
            for text in (text for kind in mine for text in record.texts(kind)):
                try:
                    found.append(captions.clean(text)[:_LONGEST])
                except BadRecord:
                    unusable += 1
        texts += found[:share]
    return texts, unusable


def _shares(sizes: Sequence[int], limit: int) -> list[int]:
    """How many each gives of at most `limit`: evenly, but none more than it has; what remains goes to the first."""
    shares = [0] * len(sizes)
    left = min(limit, sum(sizes))
    while left:
        open_ones = [i for i, size in enumerate(sizes) if shares[i] < size]
        each, extra = divmod(left, len(open_ones))
        for rank, i in enumerate(open_ones):
            more = min(each + (rank < extra), sizes[i] - shares[i])
            shares[i] += more
            left -= more
    return shares


def _chosen(size: int, count: int, seed: int) -> Iterator[int]:
    """`count` of `size` places that `seed` chooses, in order."""
    if count >= size:
        return iter(range(size))
    return iter(sorted(shuffled(i, size, seed) for i in range(count)))


def _open(folders: Sequence[str], kinds: Sequence[str] | None) -> list[Source]:
    sources = [Source(str(place), folder, what="--input") for place, folder in enumerate(folders)]
    for folder, source in zip(folders, sources):
        if not any(source.kinds.get(kind) for kind in kinds or source.kinds):
            there = printable(", ".join(source.kinds)) or "none"
            raise UserError(f"--input {folder} has no captions of --kind", kinds or "any", f"Its kinds: {there}")
    return sources


def _coverage(text: str) -> float:
    if not re.fullmatch(r"0\.\d+|1(\.0*)?", text) or float(text) < 0.98:  # SentencePiece's own bound.
        raise argparse.ArgumentTypeError(f"{text!r} is not a number from 0.98 to 1")
    return float(text)


def _parser() -> Parser:
    parser = Parser(prog="python -m aimv2_jax.data.tokenizer", description=_DESCRIPTION)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    train = commands.add_parser(
        "train", help="train a SentencePiece model on captions of prepared data sets", description=_TRAIN_DESCRIPTION
    )
    train.add_argument("--input", nargs="+", required=True, metavar="DIR", help="folders of prepared data sets")
    train.add_argument("--vocab-size", type=positive, required=True, metavar="N", help="pieces of the model")
    train.add_argument("--output", type=Path, required=True, metavar="FILE.model", help="the file to write")
    train.add_argument("--kind", nargs="+", metavar="KIND", help="kinds of captions (default: all)")
    train.add_argument("--model-type", choices=MODEL_TYPES, default="bpe", help="default: bpe")
    train.add_argument(
        "--max-captions",
        type=positive,
        default=MAX_CAPTIONS,
        metavar="N",
        help=f"captions to train on, which the data sets give in equal shares (default: {MAX_CAPTIONS:,})",
    )
    train.add_argument("--seed", type=int, default=0, metavar="N", help="chooses the captions (default: 0)")
    train.add_argument(
        "--character-coverage",
        type=_coverage,
        default=0.9995,
        metavar="SHARE",
        help="share of the text's letters that get pieces of their own; 0.98 to 1 (default: 0.9995)",
    )
    train.add_argument("--no-byte-fallback", action="store_true", help="rare letters are unknown, and not bytes")
    train.add_argument("--overwrite", action="store_true", help="replace FILE.model")
    return parser


@reports_user_errors
def main(arguments: Sequence[str] | None = None) -> int:
    """The command `python -m aimv2_jax.data.tokenizer`."""
    args = _parser().parse_args(arguments)
    check_output(args.output)
    if args.output.exists() and not args.overwrite:
        raise UserError("--output is there already", str(args.output), "Give another file, or --overwrite")
    sources = _open(args.input, args.kind)
    texts, unusable = sample_captions(sources, args.kind, args.max_captions, args.seed)
    if not texts:
        raise UserError("--input has no usable caption", args.input, "Prepare the data sets again")
    model = train_model(texts, args.vocab_size, args.model_type, not args.no_byte_fallback, args.character_coverage)
    write_whole(args.output, model)
    left_out = f" ({unusable:,} unusable left out)" if unusable else ""
    print(
        f"{args.output}: {args.vocab_size:,} pieces from {len(texts):,} captions of {len(sources)} data sets{left_out}"
    )
    return EXIT_FINISHED
