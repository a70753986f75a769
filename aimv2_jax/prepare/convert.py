"""Converts a dataset of an older version, whose shards are ArrayRecord files, to one of bag files.

    python -m aimv2_jax.prepare.convert OLD NEW

OLD has a dataset.json of format 2 or 3; NEW is a new folder. Both are local or in a bucket (gs:// or s3://). NEW gets
the same records in the same order, and for each shard of OLD one shard, or several if it exceeds 4 GiB. A record that
cannot be read becomes an empty one, which training replaces as it did before; dataset.json counts these under
`changes`. After an interruption, run the same command with --resume.
"""

from __future__ import annotations

import dataclasses
import json
import sys
import zlib
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any, BinaryIO

from aimv2_jax.cli import Parser, positive
from aimv2_jax.console import print_line
from aimv2_jax.data import bag
from aimv2_jax.data.dataset_info import DATASET_FILE, FORMAT_VERSION, DatasetInfo
from aimv2_jax.data.dataset_stats import DatasetStats, SampleCount
from aimv2_jax.data.loading.workers import cores
from aimv2_jax.data.shards import Shard, ShardWriter
from aimv2_jax.errors import EXIT_FINISHED, UserError, cli_main
from aimv2_jax.prepare.inputs import open_files
from aimv2_jax.prepare.inputs.samples import InputShard
from aimv2_jax.prepare.output import OutputFolder, TaskResult
from aimv2_jax.prepare.report import report
from aimv2_jax.prepare.runners import Runner, run_local
from aimv2_jax.prepare.tasks import Task
from aimv2_jax.storage.bucket import check_scheme
from aimv2_jax.storage.files import read_bytes
from aimv2_jax.storage.paths import resolve_path
from aimv2_jax.untrusted import MAX_JSON_BYTES, parse_json_object

_OLD_FORMATS = (2, 3)
_READ_BYTES = 1 << 20


@dataclasses.dataclass(frozen=True)
class ConversionTask(Task):
    """One ArrayRecord file, which has so many records."""

    records: int


@dataclasses.dataclass(frozen=True)
class Conversion:
    """Conversion to the folder `output`; the `Job` of its tasks."""

    output: str

    def run(self, task: ConversionTask) -> TaskResult:
        """Writes the records of an ArrayRecord file to bag files; raises as `convert`."""
        output, stats = OutputFolder(self.output, "NEW"), DatasetStats()
        [shard] = task.shards
        with output.errors():
            with output.scratch() as scratch, ShardWriter(scratch, output.add_file, task.limit, task.prefix) as writer:
                for record in _read_records(shard.path, task.records, stats):
                    writer.write(record)
                    stats.records += 1
            result = TaskResult(tuple(writer.shards), stats)
            output.finish_task(task, result)
        return result


def convert(old: str, new: str, runner: Runner = run_local, resume: bool = False) -> DatasetInfo:
    """Converts the dataset in the folder `old` to bag files in the folder `new`.

    Args:
      runner: runs the tasks; the result does not depend on it.
      resume: continues work that the same call has begun, or returns its finished dataset.

    Raises:
      UserError: if `old` is no dataset of an older version, has a damaged shard, or `new` cannot be written.
      StorageError: if a bucket fails, and may work later.
    """
    for path, name in ((old, "OLD"), (new, "NEW")):
        check_scheme(path, name)
    old = old.rstrip("/") if open_files.is_remote(old) else str(resolve_path(old))
    info = _read_info(old)
    tasks = [
        ConversionTask(
            number, (InputShard("array_record", f"{old}/{shard.file}", shard.bytes),), bag.MAX_BYTES, shard.records
        )
        for number, shard in enumerate(info.shards)
    ]
    output = OutputFolder(new, "NEW")
    with output.errors():
        output.check_free(resume)
        with output.locked():
            finished = output.begin(info.made, tasks, resume, source="OLD")
            if finished is not None:
                return finished
            todo = [task for task, result in zip(tasks, output.results(tasks)) if result is None]
            runner(todo, Conversion(new))
            return _finish(output, tasks, info)


def _read_info(old: str) -> DatasetInfo:
    """The info of a dataset of an older version, in this version; `made` also says what was converted."""
    path = f"{old}/{DATASET_FILE}"
    with open_files.input_errors(path):
        text = read_bytes(path, MAX_JSON_BYTES)
    try:
        tree = parse_json_object(text)
        version = tree["format_version"]
        if version == FORMAT_VERSION:
            raise UserError("OLD already has the format that this program reads", old, "Use it as it is")
        if version not in _OLD_FORMATS:
            raise UserError(f"OLD has a format that cannot be converted ({version})", old, "Prepare the dataset again")
        tree.setdefault("records_with", tree["kinds"])  # In version 2, a record has one caption of a kind.
        tree |= {"format_version": FORMAT_VERSION, "index_crc32": 0}
        info = DatasetInfo.from_json(json.dumps(tree))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"OLD: {DATASET_FILE} cannot be read", old, "Copy the dataset again") from error
    converted = {"format_version": version, "crc32": zlib.crc32(text)}
    return dataclasses.replace(info, made={"converted": converted, **info.made})


def _read_records(path: str, count: int, stats: DatasetStats) -> Iterator[bytes]:
    """Yields the `count` records of an ArrayRecord file, empty ones for damaged ones, which are counted."""
    with open_files.input_errors(path), open_files.open_file(path) as file:
        # The path of the descriptor, since the copy of a file in a bucket has no name.
        reader = _array_record().ArrayRecordReader(f"/dev/fd/{file.fileno()}", options="readahead_buffer_size:0")
        found = reader.num_records()
        if found != count:
            _check_readable(file)
            what = f"a shard of OLD holds {found:,} records, and {DATASET_FILE} says {count:,}"
            raise UserError(what, path, "Copy the dataset again, or prepare it again")
        for index in range(count):
            try:
                [record] = reader.read([index])
            except Exception:  # array_record raises several types for damaged records, and for failing disks.
                _check_readable(file)
                stats.change("unreadable_record", f"{path.rpartition('/')[2]}, record {index}")
                record = b""
            yield record


def _check_readable(file: BinaryIO) -> None:
    """Raises OSError if the disk fails to read the file, which is then not damaged."""
    file.seek(0)
    while file.read(_READ_BYTES):
        pass


def _array_record() -> Any:
    try:
        from array_record.python import array_record_module
    except ImportError as error:
        remedy = "Install it: pip install array-record"
        raise UserError("OLD can only be read with array_record", str(error), remedy) from error
    return array_record_module


def _finish(output: OutputFolder, tasks: Sequence[Task], info: DatasetInfo) -> DatasetInfo:
    shards, changes = list[Shard](), dict(info.changes)
    for task, result in zip(tasks, output.results(tasks)):
        if result is None:
            remedy = "Run the same command with --resume"
            raise UserError(f"the output of task {task.number} is missing", output.name, remedy)
        shards += result.shards
        for name, change in result.stats.changes.items():
            changes[name] = changes.get(name, SampleCount()).plus(change.count, change.keys)
    info = dataclasses.replace(
        info,
        shards=tuple(shards),
        bytes=sum(shard.bytes for shard in shards),
        index_crc32=output.add_index(shards),
        changes=dict(sorted(changes.items())),
    )
    output.finish(info)
    return info


def _parser() -> Parser:
    parser = Parser(prog="python -m aimv2_jax.prepare.convert", description=__doc__)
    parser.add_argument("old", metavar="OLD", help="folder of the dataset in ArrayRecord files")
    parser.add_argument("new", metavar="NEW", help="folder of the new dataset")
    parser.add_argument("--workers", type=positive, metavar="N", help="number of processes (one per CPU)")
    parser.add_argument("--resume", action="store_true", help="continue an interrupted conversion to NEW")
    return parser


@cli_main
def main(arguments: Sequence[str] | None = None) -> int:
    args = _parser().parse_args(arguments)
    _array_record()
    runner = partial(run_local, workers=args.workers or cores())
    print_line(report(convert(args.old, args.new, runner, args.resume)))
    return EXIT_FINISHED


if __name__ == "__main__":
    sys.exit(main())
