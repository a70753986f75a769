"""Prepares a dataset for training and evaluation from images with captions, labels or masks.

    python -m aimv2_jax.prepare --input 'web/*.tar' --output data/web \\
        --caption alt=txt --caption synthetic=json:synthetic_caption --label class=json:class
    python -m aimv2_jax.prepare --input imagefolder:imagenet/train --output data/imagenet
    python -m aimv2_jax.prepare --input set.csv --split train --output data/set --label class=label --image mask=mask

Inputs are recognised by their content: webdataset tars as img2dataset writes them, img2dataset's parquet, Hugging
Face's parquet and folders of save_to_disk, .jsonl and .csv tables with image files in the same folder. imagefolder:DIR
has a folder of images for each class. They are local or in a bucket (gs:// or s3://), as is the output.

FIELD is, for a tar: txt, or json:NAME for a name in the json member; for parquet, Arrow and csv: a column; for jsonl: a
key; for imagefolder: class. A field may hold a list of texts, and a kind may have several fields (--caption
synthetic=A synthetic=B): each text is a caption of that kind, and training uses a different one each time that it reads
the image.
Without --caption, the kind alt is a tar's txt (or json:caption), or a table's first column of caption, text, alt, TEXT,
alt_text, description; an input with labels or second images needs none. Without --label, the labels are an
imagefolder's class, and the columns with ClassLabel features. OUTPUT/dataset.json has the names of the classes in the
order of their numbers.

--image NAME=FIELD stores a mask or depth map beside the image: a PNG with one value of 8 or 16 bits for each pixel of
the image. FIELD is, for a tar: mask.png for the members KEY.mask.png; for parquet and Arrow: a column of images; for
tables: a column or key with its path; for imagefolder: a folder with PNGs in the places of the images.

A sample is dropped if its image cannot be decoded, is too small, too large or too elongated, if no caption is left
after cleaning, if its label is none of the classes, or if a second image is missing, damaged, of another size or in
colours. OUTPUT/dataset.json counts dropped samples by reason. After an interruption, run the same command with
--resume. The dataset depends only on the inputs and these flags, not on --workers or --runner.
"""

from __future__ import annotations

import dataclasses
import logging
import os
import sys
from collections.abc import Collection, Mapping, Sequence
from functools import partial
from pathlib import PurePath
from typing import Any

from aimv2_jax.console import print_line
from aimv2_jax.data.dataset_info import DatasetInfo
from aimv2_jax.data.dataset_stats import DatasetStats
from aimv2_jax.data.loading.workers import cores
from aimv2_jax.data.shards import Shard
from aimv2_jax.errors import EXIT_FINISHED, UserError, cli_main
from aimv2_jax.prepare.filters import Rules, field_list
from aimv2_jax.prepare.flags import parse_arguments, rules_of
from aimv2_jax.prepare.inputs import image_folder
from aimv2_jax.prepare.inputs.discover import find_shards
from aimv2_jax.prepare.inputs.reader import check_default_captions, check_fields, check_maps, check_split
from aimv2_jax.prepare.inputs.samples import InputShard
from aimv2_jax.prepare.output import OutputFolder
from aimv2_jax.prepare.report import count_lines, report
from aimv2_jax.prepare.runners import Runner, beam_pipeline, run_beam, run_local
from aimv2_jax.prepare.tasks import Task, partition_tasks
from aimv2_jax.prepare.worker import Job
from aimv2_jax.storage.bucket import check_scheme
from aimv2_jax.storage.files import is_remote
from aimv2_jax.storage.paths import resolve_path


def prepare(
    inputs: Sequence[str],
    output: str,
    rules: Rules,
    shard_size: int = 10**9,
    runner: Runner = run_local,
    resume: bool = False,
    follow_links: bool = False,
    split: str | None = None,
) -> DatasetInfo:
    """Prepares a dataset from `inputs` in the folder `output`.

    Args:
      shard_size: approximate bytes of input per output shard.
      runner: runs the tasks; the result does not depend on it.
      resume: continues work that the same call has begun, or returns its finished dataset.
      follow_links: follows links that lead out of the folder that they are in.
      split: the split to prepare, of inputs that have several; by their files' names and folders, or by a field.

    Raises:
      UserError: if the inputs, the rules or the output cannot be used, for example if no sample passes the filters.
      StorageError: if the bucket of an input or the output fails, and may work later.
    """
    check_scheme(output, "--output")
    output_folder = OutputFolder(output)
    with output_folder.errors():
        output_folder.check_free(resume)
    shards = find_shards(inputs, follow_links, split)
    if any(shard.kind == image_folder.KIND for shard in shards):
        rules = dataclasses.replace(rules, images={name: _full_path(folder) for name, folder in rules.images.items()})
    check_fields(shards, rules.fields)
    if rules.images:
        check_maps(shards, rules.images.values())
    if split is not None:
        check_split(shards, split)
    if not (rules.captions or rules.labels or rules.images):
        check_default_captions(shards)
    tasks = partition_tasks(shards, shard_size)
    command = _command(shards, rules, shard_size, follow_links, split)
    with output_folder.errors(), output_folder.locked():
        finished = output_folder.begin(command, tasks, resume)
        if finished is not None:
            return finished
        todo = [task for task, result in zip(tasks, output_folder.results(tasks)) if result is None]
        runner(todo, Job(output, rules, split))
        return _finish(output_folder, tasks, rules, command)


def _full_path(folder: str) -> str:
    return folder if is_remote(folder) else os.path.abspath(resolve_path(folder))


def _command(
    shards: Sequence[InputShard], rules: Rules, shard_size: int, follow_links: bool, split: str | None
) -> dict[str, Any]:
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
        **({"split": split} if split is not None else {}),
        **({"image": {name: PurePath(field).name for name, field in rules.images.items()}} if rules.images else {}),
        **({"image-bits": dict(rules.bits)} if rules.bits else {}),
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
    _check_bits(rules, stats)
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


def _check_bits(rules: Rules, stats: DatasetStats) -> None:
    """Raises if some of the second images of a name have 8 bits and others 16: the same value would mean two things."""
    for name, count in stats.images.items():
        if count.bits_8.count and count.bits_16.count and name not in rules.bits:
            few, many = sorted([(count.bits_8, 8), (count.bits_16, 16)], key=lambda item: item[0].count)
            what = f"--image {name} has {many[0].count:,} maps of {many[1]} bits and {few[0].count:,} of {few[1]} bits"
            remedy = f"Give --image-bits {name}={many[1]} to drop the others, and another --output or remove this one"
            raise UserError(what, few[0].keys[0], remedy)


@cli_main
def main(arguments: Sequence[str] | None = None) -> int:
    args = parse_arguments(__doc__, arguments)
    rules = rules_of(args)
    if args.runner == "beam":
        runner = partial(run_beam, pipeline=beam_pipeline(args.beam_options or ""))
        logging.getLogger("apache_beam").setLevel(logging.ERROR)
    else:
        runner = partial(run_local, workers=args.workers or cores())
    size, resume, links = args.shard_size, args.resume, args.follow_links
    print_line(report(prepare(args.input, args.output, rules, size, runner, resume, links, args.split)))
    return EXIT_FINISHED


if __name__ == "__main__":
    sys.exit(main())
