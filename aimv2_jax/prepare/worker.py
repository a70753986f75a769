"""Execution of one task: filters its samples and writes its output shards and statistics."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator

from aimv2_jax.data.dataset_stats import DatasetStats
from aimv2_jax.data.records import encode
from aimv2_jax.data.shards import ShardWriter
from aimv2_jax.errors import StorageError, UserError
from aimv2_jax.prepare.filters import DroppedSample, Rules, check, text_or_none
from aimv2_jax.prepare.inputs import reader as inputs
from aimv2_jax.prepare.inputs.samples import BadInput, InputShard, Sample
from aimv2_jax.prepare.output import RESUME_HINT, OutputFolder, TaskResult
from aimv2_jax.prepare.slow_samples import SlowSampleLog
from aimv2_jax.prepare.tasks import Task
from aimv2_jax.storage.files import is_temporary


@dataclasses.dataclass(frozen=True)
class Job:
    """Preparation in the folder `output` by `rules`, of the samples of `split`, which all its tasks share."""

    output: str
    rules: Rules
    split: str | None = None

    def run(self, task: Task) -> TaskResult:
        """Writes the shards of `task` and then its result, which depends only on the task and the rules.

        Raises:
          UserError: if the input cannot be opened, or the output cannot be written.
          StorageError: if the bucket of the input or output fails, and may work later.
        """
        output, stats = OutputFolder(self.output), DatasetStats()
        with output.errors():  # `_read_errors` converts those of the input.
            with (
                output.scratch() as scratch,
                ShardWriter(scratch, output.add_file, task.limit, task.prefix) as writer,
                SlowSampleLog() as log,
            ):
                for shard in task.shards:
                    _prepare_shard(shard, self.rules, self.split, stats, writer, log)
            result = TaskResult(tuple(writer.shards), stats)
            output.finish_task(task, result)
        return result


def _prepare_shard(
    shard: InputShard, rules: Rules, split: str | None, stats: DatasetStats, writer: ShardWriter, log: SlowSampleLog
) -> None:
    log.begin(f"the first sample of {shard.path}")
    with _read_errors(shard):
        rules = _with_defaults(rules, shard, stats)
    for item in _items(shard, rules, split):
        log.begin(f"{item.key} of {shard.path}, or the sample after it,")
        if isinstance(item, BadInput):
            stats.lose(item.reason, item.samples, item.num_bytes, item.key)
            continue
        if split is not None and not _is_of_split(item, split, shard):
            stats.drop("other_split", item.key)
            continue
        try:
            checked = check(item, rules)
        except DroppedSample as dropped:
            stats.drop(dropped.reason, item.key)
            continue
        record = checked.record
        writer.write(encode(record))
        stats.keep(record.captions, record.labels, checked.size, checked.images)
        for change in checked.changes:
            stats.change(change, record.key)


def _with_defaults(rules: Rules, shard: InputShard, stats: DatasetStats) -> Rules:
    """The rules with the default captions and labels of a shard, whose classes are added to `stats`."""
    classes = inputs.declared_classes(shard)
    labels = rules.labels or {field: field for field in classes}
    for label, field in labels.items():
        if field in classes:
            stats.declare(label, classes[field])
    return dataclasses.replace(rules, captions=rules.captions or inputs.default_captions(shard), labels=labels)


def _items(shard: InputShard, rules: Rules, split: str | None) -> Iterator[Sample | BadInput]:
    fields = (*rules.fields, *(inputs.SPLIT_FIELDS if split is not None else ()))
    with _read_errors(shard):
        yield from inputs.read(shard, fields, tuple(rules.images.values()))


def _is_of_split(sample: Sample, split: str, shard: InputShard) -> bool:
    """Whether a row belongs to `split`: by its own field, or as all rows of a shard that is of that split."""
    values = [sample.fields[field] for field in inputs.SPLIT_FIELDS if field in sample.fields]
    return text_or_none(values[0]) == split if values else shard.of_split


@contextlib.contextmanager
def _read_errors(shard: InputShard) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        reason, path = error.strerror or str(error), error.filename or shard.path
        if is_temporary(error):
            raise StorageError(f"--input cannot be read: {reason}: {path}; --resume keeps finished work") from error
        what = f"--input cannot be read: {reason}"
        raise UserError(what, path, f"Fix it or leave it out, {RESUME_HINT}") from error
