"""Which input goes into which output shards: decided by the inputs alone, whoever does the work."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Sequence

from aimv2_jax.data.inputs.samples import InputShard

# A shard may grow so much beyond its target: records take a little more room than some inputs, and a rest of a few
# records would become a shard of its own.
_SLACK = 1.125


@dataclasses.dataclass(frozen=True)
class Task:
    """Consecutive input shards whose samples become output shards of `limit` bytes, with names that begin alike."""

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


def tasks_of(shards: Sequence[InputShard], shard_size: int) -> list[Task]:
    """Groups of at most `shard_size` bytes where an input is not larger; a larger one becomes several equal shards."""
    tasks = []
    for number, group in enumerate(_groups(shards, shard_size)):
        total = sum(shard.num_bytes for shard in group)
        pieces = max(1, -(-total // shard_size))
        tasks.append(Task(number, tuple(group), int(_SLACK * (shard_size if pieces == 1 else total / pieces))))
    return tasks


def _groups(shards: Iterable[InputShard], most: int) -> Iterable[list[InputShard]]:
    group: list[InputShard] = []
    size = 0
    for shard in shards:
        if group and size + shard.num_bytes > most:
            yield group
            group, size = [], 0
        group.append(shard)
        size += shard.num_bytes
    if group:
        yield group
