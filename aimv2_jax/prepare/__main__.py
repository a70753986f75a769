"""Prepares a dataset for training from image-text pairs.

    python -m aimv2_jax.prepare --input 'web/*.tar' --output data/web \\
        --caption alt=txt --caption synthetic=json:synthetic_caption --label class=json:class

Inputs are recognised by their content: webdataset tars as img2dataset writes them, img2dataset's parquet, Hugging
Face's image-text parquet, .jsonl and .csv tables with image files in the same folder. They are local or in a bucket
(gs:// or s3://), as is the output.

FIELD is, for a tar: txt, or json:NAME for a name in the json member; for parquet and csv: a column; for jsonl: a key.
A field may hold a list of texts, and a kind may have several fields (--caption synthetic=A synthetic=B): each text is a
caption of that kind, and training uses a different one each time that it reads the image.
Without --caption, the kind alt is a tar's txt (or json:caption), or a table's first column of caption, text, alt, TEXT,
alt_text, description.

A sample is dropped if its image cannot be decoded, is too small, too large or too elongated, or if no caption is left
after cleaning. OUTPUT/dataset.json counts dropped samples by reason. After an interruption, run the same command with
--resume. The dataset depends only on the inputs and these flags, not on --workers or --runner.
"""

from __future__ import annotations

import argparse
import logging
import math
import sys
from collections.abc import Collection, Mapping, Sequence
from functools import partial
from pathlib import PurePath
from typing import Any

from aimv2_jax.cli import Parser, positive, size
from aimv2_jax.console import print_line
from aimv2_jax.data.dataset_info import DatasetInfo
from aimv2_jax.data.dataset_stats import DatasetStats
from aimv2_jax.data.loading.workers import cores
from aimv2_jax.data.shards import Shard
from aimv2_jax.errors import EXIT_FINISHED, UserError, cli_main
from aimv2_jax.prepare.filters import Rules, field_list
from aimv2_jax.prepare.inputs.discover import find_shards
from aimv2_jax.prepare.inputs.reader import check_default_captions, check_fields
from aimv2_jax.prepare.inputs.samples import InputShard
from aimv2_jax.prepare.output import OutputFolder
from aimv2_jax.prepare.report import count_lines, report
from aimv2_jax.prepare.runners import Runner, beam_pipeline, run_beam, run_local
from aimv2_jax.prepare.tasks import Task, partition_tasks
from aimv2_jax.prepare.worker import Job
from aimv2_jax.storage.bucket import check_scheme

_MAX_NAME_LENGTH = 100  # Characters of a kind's or label's name, which every record repeats.
_MAX_SHARD_SIZE = 4 * 10**9  # In round numbers below `bag.MAX_BYTES`.


def prepare(
    inputs: Sequence[str],
    output: str,
    rules: Rules,
    shard_size: int = 10**9,
    runner: Runner = run_local,
    resume: bool = False,
    follow_links: bool = False,
) -> DatasetInfo:
    """Prepares a dataset from `inputs` in the folder `output`.

    Args:
      shard_size: approximate bytes of input per output shard.
      runner: runs the tasks; the result does not depend on it.
      resume: continues work that the same call has begun, or returns its finished dataset.
      follow_links: follows links that lead out of the folder that they are in.

    Raises:
      UserError: if the inputs, the rules or the output cannot be used, for example if no sample passes the filters.
      StorageError: if the bucket of an input or the output fails, and may work later.
    """
    check_scheme(output, "--output")
    output_folder = OutputFolder(output)
    with output_folder.errors():
        output_folder.check_free(resume)
    shards = find_shards(inputs, follow_links)
    check_fields(shards, rules.fields)
    if not rules.captions:
        check_default_captions(shards)
    tasks = partition_tasks(shards, shard_size)
    command = _command(shards, rules, shard_size, follow_links)
    with output_folder.errors(), output_folder.locked():
        finished = output_folder.begin(command, tasks, resume)
        if finished is not None:
            return finished
        todo = [task for task, result in zip(tasks, output_folder.results(tasks)) if result is None]
        runner(todo, Job(output, rules))
        return _finish(output_folder, tasks, rules, command)


def _command(shards: Sequence[InputShard], rules: Rules, shard_size: int, follow_links: bool) -> dict[str, Any]:
    """All values that the dataset depends on, by flag; input files without their folders, which vary by machine."""
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
        **({"follow-links": True} if follow_links else {}),
    }


def _finish(
    output_folder: OutputFolder, tasks: Sequence[Task], rules: Rules, command: Mapping[str, Any]
) -> DatasetInfo:
    stats, shards = DatasetStats(), list[Shard]()
    for task, result in zip(tasks, output_folder.results(tasks)):
        if result is None:
            remedy = "Run the same command with --resume"
            raise UserError(f"the output of task {task.number} is missing", output_folder.name, remedy)
        stats.add(result.stats)
        shards += result.shards
    if not stats.records:
        output_folder.clear()
        counts = "; ".join(count_lines(stats.drops, stats.lost))
        if not stats.samples:
            names = [shard.path for task in tasks for shard in task.shards]
            what = "--input has no samples" + (f" ({counts})" if counts else "")
            raise UserError(what, names[0] if len(names) == 1 else f"{names[0]}, ...", "Give undamaged files")
        remedy = "Check the first sample of each reason, --caption and the size limits"
        raise UserError("--input has no usable sample", counts, remedy)
    _check_names_found("--caption", rules.captions, stats.kinds, stats)
    _check_names_found("--label", rules.labels, stats.labels, stats)
    info = DatasetInfo.from_stats(stats, shards, output_folder.add_index(shards), made=command)
    output_folder.finish(info)
    return info


def _check_names_found(
    flag: str, requested: Mapping[str, str | Sequence[str]], found: Collection[str], stats: DatasetStats
) -> None:
    """Raises if no record has a caption kind or label that was requested."""
    for name, fields in requested.items():
        if name not in found:
            counts = "; ".join([f"0 of {stats.records:,} records", *count_lines(stats.changes)])
            remedy = "Omit it or name another field, and give another --output or remove this one"
            pairs = " ".join(f"{name}={field}" for field in field_list(fields))
            raise UserError(f"no record has {flag} {pairs}", counts, remedy)


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


def _parser() -> Parser:
    parser = Parser(prog="python -m aimv2_jax.prepare", description=__doc__)
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


@cli_main
def main(arguments: Sequence[str] | None = None) -> int:
    args = _parser().parse_args(arguments)
    keep: dict[str, tuple[str, ...]] = {}
    for field, value in args.keep:
        keep[field] = (*keep.get(field, ()), value)
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
