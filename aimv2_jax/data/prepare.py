"""Makes a data set that can be trained on out of image-text pairs, however they lie.

    python -m aimv2_jax.data.prepare --input 'web/*.tar' --output data/web \\
        --caption alt=txt --caption synthetic=json:synthetic_caption --label class=json:class

Inputs, recognised by looking: webdataset tars as img2dataset writes them, img2dataset's parquet, Hugging Face's
image-text parquet, .jsonl and .csv tables beside their pictures. Local, or in a bucket (gs://).

FIELD is, for a tar: txt, or json:NAME for a name in the json member; for parquet and csv: a column; for jsonl: a key.
A field may hold a list of texts, and a kind may have several fields (--caption synthetic=A synthetic=B): each text is a
caption of that kind, and training takes another one each time that it shows the picture.
Without --caption, the kind alt is a tar's txt (or json:caption), or the first of caption, text, alt, TEXT, alt_text,
description that a table has.

A sample is left out where its picture can't be opened, is too small, large or elongated, or no caption is left after
cleaning; what is left out is counted by reason in OUTPUT/dataset.json. Interrupted, the same command with --resume
goes on. The data set depends on the inputs and these flags only, not on --workers or --runner.
"""

from __future__ import annotations

import argparse
import logging
import math
import re
import sys
from collections.abc import Collection, Iterator, Mapping, Sequence
from functools import partial
from pathlib import PurePath
from typing import Any

from aimv2_jax.console import print_line
from aimv2_jax.data.books import Books
from aimv2_jax.data.datasets import DatasetInfo
from aimv2_jax.data.inputs.discover import find
from aimv2_jax.data.inputs.read import check_fields, default_captions, fields_of
from aimv2_jax.data.inputs.samples import InputShard
from aimv2_jax.data.preparing.checks import Rules, fields_of_kind
from aimv2_jax.data.preparing.groups import Task, tasks_of
from aimv2_jax.data.preparing.output import Output
from aimv2_jax.data.preparing.runners import Runner, beam_pipeline, run_beam, run_local
from aimv2_jax.data.preparing.work import Job
from aimv2_jax.data.shards import Shard
from aimv2_jax.data.workers import cores
from aimv2_jax.errors import EXIT_FINISHED, UserError, reports_user_errors
from aimv2_jax.flags import Parser, positive
from aimv2_jax.untrusted import printable

_UNITS = {"": 1, "B": 1} | {
    f"{prefix}{unit}": base**power
    for unit, base in (("B", 1000), ("iB", 1024))
    for power, prefix in enumerate("KMGT", start=1)
}
_LOOKED_AT = 5
_MOST_LETTERS = 100  # Of a kind's or label's name, which every record repeats.
_MAX_LINE = 10_000  # Characters of the report.
_HINTS = {  # By the reason why samples are dropped or lost.
    "link_out_of_folder": "--follow-links takes what links lead to",
    "decompression_bomb": "an input that unpacks to over a hundred times its size is read up to there",
    "oversized_file": "no picture has more than 256 MiB",
}
_LEAST_SHARD = 1000  # A bare "1" is a slip: it would make a file of every record.


def prepare(
    inputs: Sequence[str],
    output: str,
    rules: Rules,
    shard_size: int = 10**9,
    runner: Runner = run_local,
    resume: bool = False,
    follow_links: bool = False,
) -> DatasetInfo:
    """Prepares `inputs` in `output`.

    Args:
      shard_size: bytes of input that an output shard is made of, about.
      runner: does the work; what comes of it does not depend on who does it.
      resume: goes on with work that this very call has begun; finished, it is the answer.
      follow_links: takes what links lead to outside of the folder that they are in.

    Raises:
      UserError: if the inputs, the rules or the output make it impossible: not one sample can be used, say.
    """
    place = Output(output)
    place.check_free(resume)
    shards = find(inputs, follow_links)
    _check(shards, rules)
    tasks, command = tasks_of(shards, shard_size), _command(shards, rules, shard_size, follow_links)
    with place.claimed():
        finished = place.begin(command, tasks, resume)
        if finished is not None:
            return finished
        todo = [task for task, done in zip(tasks, place.done(tasks)) if done is None]
        runner(todo, Job(output, rules))
        return _finish(place, tasks, rules, command)


def _check(shards: Sequence[InputShard], rules: Rules) -> None:
    """Tells mistakes in fields at once, by the first shards of each kind: one may lack a field, or be damaged."""
    check_fields(shards, rules.fields)
    if rules.captions:
        return
    for kind in dict.fromkeys(shard.kind for shard in shards):
        # Several: the first one may be empty, or too damaged to tell.
        first = [shard for shard in shards if shard.kind == kind][:_LOOKED_AT]
        known = [shard for shard in first if fields_of(shard) is not None]
        if known and not any(map(default_captions, known)):
            remedy = "Name one: --caption KIND=FIELD; --help says what FIELD can be"
            raise UserError(f"no --caption, and this {kind} input has none of the usual ones", known[0].path, remedy)


def _command(shards: Sequence[InputShard], rules: Rules, shard_size: int, follow_links: bool) -> dict[str, Any]:
    """What the data set depends on, by flag; of the inputs' names, no folder: that is this machine's own."""
    files = [PurePath(shard.path).name for shard in shards]
    return {
        "input": {
            "shards": len(shards),
            "bytes": sum(shard.num_bytes for shard in shards),
            "first": files[0],
            "last": files[-1],
        },
        "caption": dict(rules.captions),
        "label": dict(rules.labels),
        "keep": {field: list(values) for field, values in rules.keep.items()},
        "min-side": rules.min_side,
        "max-side": rules.max_side,
        "max-aspect": rules.max_aspect,
        "shard-size": shard_size,
        "verify": rules.verify,
        "decode": rules.decode,
        **({"follow-links": True} if follow_links else {}),  # Sets of older versions have no such key.
    }


def _finish(place: Output, tasks: Sequence[Task], rules: Rules, command: Mapping[str, Any]) -> DatasetInfo:
    books, shards = Books(), list[Shard]()
    for task, done in zip(tasks, place.done(tasks)):
        if done is None:
            remedy = "Give the same command with --resume"
            raise UserError(f"what task {task.number} wrote is not there", place.name, remedy)
        books.add(done.books)
        shards += done.shards
    if not books.records:
        place.clear()
        counts = "; ".join(_accounts(books.drops, books.lost))
        if not books.samples:
            names = [shard.path for task in tasks for shard in task.shards]
            what = "--input has no samples" + (f" ({counts})" if counts else "")
            raise UserError(what, names[0] if len(names) == 1 else f"{names[0]}, ...", "Give files that are whole")
        remedy = "Look at the first of these, and at --caption and the limits"
        raise UserError("--input has no sample that can be used", counts, remedy)
    _check_found("--caption", rules.captions, books.kinds, books)
    _check_found("--label", rules.labels, books.labels, books)
    info = DatasetInfo.of(books, shards, made=command)
    place.finish(info)
    return info


def _check_found(flag: str, asked: Mapping[str, str | Sequence[str]], found: Collection[str], books: Books) -> None:
    """Refuses what no record has: a field that the inputs were thought to have."""
    for name, field in asked.items():
        if name not in found:
            counts = "; ".join([f"0 of {books.records:,} records", *_accounts(books.changes)])
            remedy = "Leave it out or name another field, and give another --output or remove this one"
            pairs = " ".join(f"{name}={each}" for each in fields_of_kind(field))
            raise UserError(f"no record has {flag} {pairs}", counts, remedy)


def _accounts(*accounts: Mapping[str, Any]) -> list[str]:
    """One line for each entry: how many, why, and the first."""
    lines = []
    for reason, entry in (item for account in accounts for item in account.items()):
        count = entry.count if hasattr(entry, "count") else entry.samples
        size = f", {entry.bytes:,} bytes" if hasattr(entry, "bytes") else ""
        first = f" (first: {entry.keys[0]})" if entry.keys else ""
        hint = f"; {_HINTS[reason]}" if reason in _HINTS else ""
        lines.append(f"{count:,} {reason}{size}{first}{hint}")
    return lines


def report(info: DatasetInfo) -> str:
    """What came of the samples, in lines."""
    lines = [
        f"{info.records:,} records of {info.samples:,} samples in {len(info.shards):,} shards, {info.bytes:,} bytes",
        "captions: " + ", ".join(_caption_counts(info)),
    ]
    if info.labels:
        lines.append("labels: " + ", ".join(info.labels))
    for title, account in (("dropped", info.drops), ("changed", info.changes), ("lost", info.lost)):
        lines += [f"{title}: {line}" for line in _accounts(account)]
    return "\n".join(printable(line, _MAX_LINE) for line in lines)


def _caption_counts(info: DatasetInfo) -> Iterator[str]:
    for kind, count in info.kinds.items():
        records = info.records_with[kind]
        yield f"{kind} {count:,}" + (f" (of {records:,} records)" if count != records else "")


def _size(text: str) -> int:
    match = re.fullmatch(r"(\d+(?:\.\d+)?) ?([A-Za-z]*)", text.strip())
    unit = {name.lower(): size for name, size in _UNITS.items()}.get(match[2].lower()) if match else None
    if match is None or unit is None:
        raise argparse.ArgumentTypeError(f"{text!r} is not a size such as 1GB, 500MB or 256MiB")
    size = int(min(float(match[1]) * unit, sys.maxsize))
    if size < _LEAST_SHARD:
        raise argparse.ArgumentTypeError(f"{text!r} is below {_LEAST_SHARD} bytes; write a unit, as in 1GB")
    return size


def _aspect(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 1 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number from 1 on (longer side / shorter side)")
    return value


def _pair(text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not (equals and name and value):
        raise argparse.ArgumentTypeError(f"{text!r} is not of the form NAME=VALUE")
    return name, value


def _named(text: str) -> tuple[str, str]:
    """As `_pair`, with a name that people write in configs and read in tables."""
    name, value = _pair(text)
    if not (name.isprintable() and name == name.strip() and len(name) <= _MOST_LETTERS):
        raise argparse.ArgumentTypeError(f"{name[:_MOST_LETTERS]!r} is not a name of up to {_MOST_LETTERS} letters")
    return name, value


def _caption_fields(pairs: Sequence[tuple[str, str]]) -> dict[str, str | list[str]]:
    """By kind its field, or a list of them."""
    fields: dict[str, list[str]] = {}
    for kind, field in pairs:
        if field in fields.setdefault(kind, []):
            raise UserError(f"--caption names a field of {kind!r} twice", f"{kind}={field}", "Give it once")
        fields[kind].append(field)
    return {kind: found[0] if len(found) == 1 else found for kind, found in fields.items()}


def _fields(flag: str, pairs: Sequence[tuple[str, str]]) -> dict[str, str]:
    fields: dict[str, str] = {}
    for name, field in pairs:
        if name in fields:
            raise UserError(f"{flag} names {name!r} twice", f"{name}={field}", "Give each a name of its own")
        fields[name] = field
    return fields


def _parser() -> Parser:
    parser = Parser(prog="python -m aimv2_jax.data.prepare", description=__doc__)
    add = parser.add_argument
    several: dict[str, Any] = dict(nargs="+", action="extend", default=[])
    add("--input", nargs="+", action="extend", required=True, metavar="PATH_OR_GLOB", help="files, folders or globs")
    add("--output", required=True, metavar="DIR", help="the data set's folder, local or gs://")
    add(
        "--caption",
        type=_named,
        metavar="KIND=FIELD",
        help="caption kinds, each of one field or several; without, what is usual for the input",
        **several,
    )
    add("--label", type=_named, metavar="NAME=FIELD", help="labels to carry along", **several)
    add(
        "--keep",
        type=_pair,
        metavar="FIELD=VALUE",
        help="takes only samples with that value; a field may have several",
        **several,
    )
    add("--min-side", type=positive, default=32, metavar="N", help="pixels of the shorter side (32)")
    add("--max-side", type=positive, metavar="N", help="pixels of the longer side (any)")
    add("--max-aspect", type=_aspect, default=20.0, metavar="X", help="longer side / shorter side (20)")
    size = "of the input that becomes one output file, which is smaller by what is left out of it (1GB)"
    add("--shard-size", type=_size, default=10**9, metavar="SIZE", help=size)
    verify = "field with the sha256 or md5 of the picture's bytes (img2dataset's is of those before its resizing)"
    add("--verify", metavar="FIELD", help=verify)
    add("--decode", action="store_true", help="decodes every picture in full: finds those that are cut")
    add("--workers", type=positive, metavar="N", help="processes (one for each CPU)")
    add("--runner", choices=("local", "beam"), default="local", help="local processes, or Apache Beam")
    add("--beam-options", metavar="OPTIONS", help="of the pipeline: --beam-options='--runner=DataflowRunner ...'")
    links = "takes what links in a folder lead to outside of it; without, a folder cannot reach your other files"
    add("--follow-links", action="store_true", help=links)
    resume = "goes on with what an interrupted run left in --output; inputs rewritten at the same size are not noticed"
    add("--resume", action="store_true", help=resume)
    return parser


@reports_user_errors
def main(arguments: Sequence[str] | None = None) -> int:
    args = _parser().parse_args(arguments)
    keep: dict[str, tuple[str, ...]] = {}
    for field, value in args.keep:
        keep[field] = (*keep.get(field, ()), value)
    if not args.output or "\0" in args.output or args.output != args.output.encode("utf-8", "replace").decode():
        raise UserError("--output is no name of a folder", args.output, "Name a folder")
    if args.max_side is not None and args.max_side < args.min_side:
        raise UserError("--max-side is below --min-side", args.max_side, f"Give {args.min_side} or more")
    if args.runner == "local" and args.beam_options is not None:
        raise UserError("--beam-options without Beam", args.beam_options, "Add --runner beam, or leave it out")
    if args.runner == "beam" and args.workers is not None:
        raise UserError("--workers is of the local runner", args.workers, "Tell Beam in --beam-options")
    rules = Rules(
        captions=_caption_fields(args.caption),
        labels=_fields("--label", args.label),
        keep=keep,
        min_side=args.min_side,
        max_side=args.max_side,
        max_aspect=args.max_aspect,
        verify=args.verify,
        decode=args.decode,
    )
    if args.runner == "beam":
        runner = partial(run_beam, pipeline=beam_pipeline(args.beam_options or ""))
        logging.getLogger("apache_beam").setLevel(logging.ERROR)
    else:
        runner = partial(run_local, workers=args.workers or cores())
    print_line(report(prepare(args.input, args.output, rules, args.shard_size, runner, args.resume, args.follow_links)))
    return EXIT_FINISHED


if __name__ == "__main__":
    sys.exit(main())
