"""Command line of the preparation: flags, and the rules that they ask for."""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from typing import Any

from aimv2_jax.cli import Parser, positive, size
from aimv2_jax.errors import UserError
from aimv2_jax.prepare.filters import Rules

_MAX_NAME_LENGTH = 100  # Characters of a kind's or label's name, which every record repeats.
_MAX_SHARD_SIZE = 4 * 10**9  # In round numbers below `bag.MAX_BYTES`.


def parse_arguments(description: str, arguments: Sequence[str] | None) -> argparse.Namespace:
    """Parses and checks the command line.

    Raises:
      UserError: for flags that do not fit together.
    """
    args = _parser(description).parse_args(arguments)
    if not args.output or "\0" in args.output or args.output != args.output.encode("utf-8", "replace").decode():
        raise UserError("--output is not a valid folder name", args.output, "Give another folder")
    if args.max_side is not None and args.max_side < args.min_side:
        raise UserError("--max-side is below --min-side", args.max_side, f"Give {args.min_side} or more")
    if args.runner == "local" and args.beam_options is not None:
        raise UserError("--beam-options needs Beam", args.beam_options, "Add --runner beam, or omit --beam-options")
    if args.runner == "beam" and args.workers is not None:
        raise UserError(
            "--workers applies to --runner local only", args.workers, "Set Beam's workers in --beam-options"
        )
    if args.split is not None and (not args.split or "/" in args.split):
        raise UserError("--split is not a name", args.split, "Give a name such as train")
    return args


def rules_of(args: argparse.Namespace) -> Rules:
    """The rules that the flags ask for.

    Raises:
      UserError: for a name that is given twice, or --image-bits of no --image.
    """
    keep: dict[str, tuple[str, ...]] = {}
    for field, value in args.keep:
        keep[field] = (*keep.get(field, ()), value)
    images = _fields("--image", args.image)
    for name, bits in args.image_bits:
        if name not in images:
            raise UserError("--image-bits names no --image", f"{name}={bits}", f"Give --image {name}=FIELD, too")
    return Rules(
        captions=_caption_fields(args.caption),
        labels=_fields("--label", args.label),
        keep=keep,
        min_side=args.min_side,
        max_side=args.max_side,
        max_aspect=args.max_aspect,
        verify=args.verify,
        decode=args.decode,
        images=images,
        bits=dict(args.image_bits),
    )


def _aspect(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 1 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of at least 1 (longer side / shorter side)")
    return value


def _shard_size(text: str) -> int:
    num_bytes = size(text)
    if num_bytes > _MAX_SHARD_SIZE:
        raise argparse.ArgumentTypeError(f"{text!r} is more than 4GB, the limit for one file of a dataset")
    return num_bytes


def _pair(text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not (equals and name and value):
        raise argparse.ArgumentTypeError(f"{text!r} is not of the form NAME=VALUE")
    return name, value


def _named_pair(text: str) -> tuple[str, str]:
    """Parses `NAME=VALUE` with a name that can be written in configs and tables."""
    name, value = _pair(text)
    if not (name.isprintable() and name == name.strip() and len(name) <= _MAX_NAME_LENGTH):
        shown = name[:_MAX_NAME_LENGTH]
        raise argparse.ArgumentTypeError(f"{shown!r} is not a name of up to {_MAX_NAME_LENGTH} printable characters")
    return name, value


def _bits(text: str) -> tuple[str, int]:
    name, bits = _pair(text)
    if bits not in ("8", "16"):
        raise argparse.ArgumentTypeError(f"{text!r} is not of the form NAME=8 or NAME=16")
    return name, int(bits)


def _caption_fields(pairs: Sequence[tuple[str, str]]) -> dict[str, str | list[str]]:
    """Caption kind -> its field, or a list of its fields."""
    fields: dict[str, list[str]] = {}
    for kind, field in pairs:
        if field in fields.setdefault(kind, []):
            raise UserError(f"--caption names a field of {kind!r} twice", f"{kind}={field}", "Give it once")
        fields[kind].append(field)
    return {kind: names[0] if len(names) == 1 else names for kind, names in fields.items()}


def _fields(flag: str, pairs: Sequence[tuple[str, str]]) -> dict[str, str]:
    fields: dict[str, str] = {}
    for name, field in pairs:
        if name in fields:
            raise UserError(f"{flag} names {name!r} twice", f"{name}={field}", "Give each a different name")
        fields[name] = field
    return fields


def _parser(description: str) -> Parser:
    parser = Parser(prog="python -m aimv2_jax.prepare", description=description)
    add = parser.add_argument
    repeatable: dict[str, Any] = dict(nargs="+", action="extend", default=[])
    add("--input", nargs="+", action="extend", required=True, metavar="PATH_OR_GLOB", help="files, folders or globs")
    add("--output", required=True, metavar="DIR", help="folder of the dataset, local, gs:// or s3://")
    add(
        "--caption",
        type=_named_pair,
        metavar="KIND=FIELD",
        help="caption kinds, each with one or more fields (default: the input's usual caption field)",
        **repeatable,
    )
    add("--label", type=_named_pair, metavar="NAME=FIELD", help="labels to store with the records", **repeatable)
    images = "second images to store with the records: masks and depth maps, PNG of 8 or 16 bits"
    add("--image", type=_named_pair, metavar="NAME=FIELD", help=images, **repeatable)
    bits = "drop samples whose second image NAME has other bits; a dataset has maps of one kind only"
    add("--image-bits", type=_bits, metavar="NAME=8|16", help=bits, **repeatable)
    split = "the split to prepare: files or folders of that name, or the rows with that value in the field split"
    add("--split", metavar="NAME", help=split)
    add(
        "--keep",
        type=_pair,
        metavar="FIELD=VALUE",
        help="keep only samples with that value; a field may have several values",
        **repeatable,
    )
    add("--min-side", type=positive, default=32, metavar="N", help="minimum pixels of the shorter side (32)")
    add("--max-side", type=positive, metavar="N", help="maximum pixels of the longer side (no limit)")
    add("--max-aspect", type=_aspect, default=20.0, metavar="X", help="maximum longer side / shorter side (20)")
    shard_size = "size of the input for one output file, at most 4GB; smaller if samples are dropped (1GB)"
    add("--shard-size", type=_shard_size, default=10**9, metavar="SIZE", help=shard_size)
    verify = "field with the sha256 or md5 of the image's bytes (img2dataset's is of the bytes before resizing)"
    add("--verify", metavar="FIELD", help=verify)
    add("--decode", action="store_true", help="decode every image completely, which finds truncated ones")
    add("--workers", type=positive, metavar="N", help="number of processes (one per CPU)")
    add("--runner", choices=("local", "beam"), default="local", help="local processes, or Apache Beam")
    add("--beam-options", metavar="OPTIONS", help="pipeline options: --beam-options='--runner=DataflowRunner ...'")
    links = "follow links that lead out of a folder; by default a folder cannot make your other files be read"
    add("--follow-links", action="store_true", help=links)
    resume = "continue an interrupted run in --output; inputs that were rewritten at the same size are not detected"
    add("--resume", action="store_true", help=resume)
    return parser
