"""Partition of consecutive input shards into tasks of about the size of an output shard."""

import itertools
import random

from aimv2_jax.prepare.inputs.samples import InputShard
from aimv2_jax.prepare.tasks import Task, partition_tasks


def shards(sizes):
    return [InputShard("webdataset", f"/{i:03d}.tar", size) for i, size in enumerate(sizes)]


def test_partition_keeps_order_and_size():
    """Each input is in one task, in order. Tasks are as large as possible; only a single input may exceed the size."""
    rng = random.Random(0)
    for _ in range(200):
        given = shards([rng.choice([0, 1, 30, 99, 100, 101, 350]) for _ in range(rng.randint(1, 20))])
        tasks = partition_tasks(given, 100)
        assert [shard for task in tasks for shard in task.shards] == given
        assert [task.number for task in tasks] == list(range(len(tasks)))
        for task in tasks:
            assert task.num_bytes <= 100 or len(task.shards) == 1
        for one, two in itertools.pairwise(tasks):
            assert one.num_bytes + two.shards[0].num_bytes > 100


def test_limit_of_output_shards():
    """A large input becomes equal shards of about the size; the limit of a shard has a slack of an eighth."""
    [task] = partition_tasks(shards([1010]), 100)
    assert 1010 / 11 < task.limit <= 1.125 * 1010 / 11
    [task] = partition_tasks(shards([10, 20]), 100)
    assert task.limit == 112


def test_task_survives_json():
    """`from_json` inverts `to_json`."""
    for task in partition_tasks([*shards([60, 60]), InputShard("csv", "/b c.csv", 5, 7, 9)], 100):
        assert Task.from_json(task.to_json()) == task
    assert task.prefix == "00001-"
