"""The work: a task's samples become its output shards, and a line in the books each."""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Collection, Iterator

from aimv2_jax.data.books import Books
from aimv2_jax.data.inputs import read as inputs
from aimv2_jax.data.inputs.samples import Damage, InputShard, Sample
from aimv2_jax.data.preparing.checks import Dropped, Rules, check
from aimv2_jax.data.preparing.groups import Task
from aimv2_jax.data.preparing.output import Done, Output
from aimv2_jax.data.preparing.slowness import SlowSampleLog
from aimv2_jax.data.records import encode
from aimv2_jax.data.shards import ShardWriter
from aimv2_jax.errors import UserError

GO_ON = "then give the same command with --resume: what is finished stays"


@dataclasses.dataclass(frozen=True)
class Job:
    """What all tasks of a run share."""

    output: str
    rules: Rules


def run_task(task: Task, job: Job) -> Done:
    """Writes the shards of `task` and then its counts: a function of the task and the rules, wherever it runs.

    Raises:
      UserError: if the input can't be opened, or the output can't be written.
    """
    output, books = Output(job.output), Books()
    try:
        with (
            output.scratch() as scratch,
            ShardWriter(scratch, output.place, task.limit, task.prefix) as writer,
            SlowSampleLog() as log,
        ):
            for shard in task.shards:
                _work(shard, job.rules, books, writer, log)
        done = Done(tuple(writer.shards), books)
        output.finish_task(task, done)
    except OSError as error:  # Those of the input are told apart below.
        what = f"--output cannot be written: {os.strerror(error.errno) if error.errno else error}"
        raise UserError(what, error.filename or job.output, f"Make room there or see to it, {GO_ON}") from error
    return done


def _work(shard: InputShard, rules: Rules, books: Books, writer: ShardWriter, log: SlowSampleLog) -> None:
    log.begin(f"the first sample of {shard.path}")
    if not rules.captions:
        with _reading(shard):
            rules = dataclasses.replace(rules, captions=inputs.default_captions(shard))
    for item in _items(shard, rules.fields):
        log.begin(f"{item.key} of {shard.path}, or what follows it,")
        if isinstance(item, Damage):
            books.lose(item.reason, item.samples, item.num_bytes, item.key)
            continue
        try:
            checked = check(item, rules)
        except Dropped as dropped:
            books.drop(dropped.reason, item.key)
            continue
        record = checked.record
        writer.write(encode(record))
        books.keep(record.captions, record.labels, checked.size)
        for what in checked.changes:
            books.change(what, record.key)


def _items(shard: InputShard, fields: Collection[str]) -> Iterator[Sample | Damage]:
    with _reading(shard):
        yield from inputs.read(shard, fields)


@contextlib.contextmanager
def _reading(shard: InputShard) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        what = f"--input cannot be read: {os.strerror(error.errno) if error.errno else error}"
        raise UserError(what, error.filename or shard.path, f"Mend it or leave it out, {GO_ON}") from error
