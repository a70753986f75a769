"""Partition of the input shards into tasks; it depends on the inputs only, not on the runner."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Sequence

from aimv2_jax.prepare.inputs.samples import InputShard

# Limit of a shard relative to its target: records are slightly larger than some inputs, and a remainder of a few
# records should not become its own shard.
_SHARD_SLACK = 1.125


@dataclasses.dataclass(frozen=True)
class Task:
    """Consecutive input shards whose samples become output shards of `limit` bytes, all named with `prefix`."""

    number: int
    shards: tuple[InputShard, ...]
    limit: int

    @property
    def num_bytes(self) -> int:
        return sum(shard.num_bytes for shard in self.shards)

    @property
    def prefix(self) -> str:
        return f"{self.number:05d}-"

    def to_json(self) -> str:
        shards = [dataclasses.asdict(shard) for shard in self.shards]
        return json.dumps({"number": self.number, "shards": shards, "limit": self.limit})

    @classmethod
    def from_json(cls, text: str) -> Task:
        tree = json.loads(text)
        return cls(tree["number"], tuple(InputShard(**shard) for shard in tree["shards"]), tree["limit"])


def partition_tasks(shards: Sequence[InputShard], shard_size: int) -> list[Task]:
    """Groups inputs into tasks of at most `shard_size` bytes; a larger input becomes several equal output shards."""
    tasks = []
    for number, group in enumerate(_groups(shards, shard_size)):
        total = sum(shard.num_bytes for shard in group)
        pieces = max(1, -(-total // shard_size))
        tasks.append(Task(number, tuple(group), int(_SHARD_SLACK * (shard_size if pieces == 1 else total / pieces))))
    return tasks


def _groups(shards: Iterable[InputShard], max_bytes: int) -> Iterable[list[InputShard]]:
    group: list[InputShard] = []
    size = 0
    for shard in shards:
        if group and size + shard.num_bytes > max_bytes:
            yield group
            group, size = [], 0
        group.append(shard)
        size += shard.num_bytes
    if group:
        yield group
