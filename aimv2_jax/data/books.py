"""The books of a data set: what came in, what became a record, and what became of the rest. They always balance."""

from __future__ import annotations

import bisect
import collections
import dataclasses
import itertools
import math
from collections.abc import Mapping
from typing import Any

from aimv2_jax import untrusted
from aimv2_jax.data.records import texts_of

FIRST_KEYS = 10
_MAX_COUNT = (1 << 63) - 1  # What numpy's int64 holds.
_MOST_LETTERS = 200  # Of a key in the books.

SIDE, ASPECT = "shorter_side_px", "aspect"
_EDGES = {
    SIDE: tuple(float(n) for k in range(4, 13) for n in (2**k, 3 * 2 ** (k - 1))[: 2 if k < 12 else 1]),
    # Width / height, a quarter of an octave each; squares are in the middle of theirs. Rounded: the same everywhere.
    ASPECT: tuple(round(2 ** ((k + 0.5) / 4), 4) for k in range(-19, 19)),
}


@dataclasses.dataclass(frozen=True)
class Histogram:
    """How many values lie in [edges[i], edges[i + 1]); the first and last bin also hold what is beyond them."""

    edges: tuple[float, ...]
    counts: tuple[int, ...]

    def __post_init__(self):
        if len(self.counts) != len(self.edges) - 1:
            raise ValueError(f"{len(self.counts)} counts between {len(self.edges)} edges")
        if not all(0 < low < high < math.inf for low, high in itertools.pairwise(self.edges)):
            raise ValueError(f"edges {self.edges}")

    @classmethod
    def from_tree(cls, tree: Mapping[str, Any]) -> Histogram:
        return cls(tuple(map(float, tree["edges"])), tuple(map(count_of, tree["counts"])))


@dataclasses.dataclass(frozen=True)
class Tally:
    """How many samples, and the first of their keys."""

    count: int = 0
    keys: tuple[str, ...] = ()

    def plus(self, count: int, keys: tuple[str, ...]) -> Tally:
        """The sum; of the keys, the first stay."""
        return Tally(self.count + count, (self.keys + keys)[:FIRST_KEYS])

    @classmethod
    def from_tree(cls, tree: Mapping[str, Any]) -> Tally:
        return cls(count_of(tree["count"]), tuple(tree["keys"]))


@dataclasses.dataclass(frozen=True)
class Loss:
    """What of the input could not be read: samples (as far as anyone knows), bytes and the first keys."""

    samples: int = 0
    bytes: int = 0
    keys: tuple[str, ...] = ()

    def plus(self, samples: int, num_bytes: int, keys: tuple[str, ...]) -> Loss:
        """The sum; of the keys, the first stay."""
        return Loss(self.samples + samples, self.bytes + num_bytes, (self.keys + keys)[:FIRST_KEYS])

    @classmethod
    def from_tree(cls, tree: Mapping[str, Any]) -> Loss:
        return cls(count_of(tree["samples"]), count_of(tree["bytes"]), tuple(tree["keys"]))


class Books:
    """Counts of samples as they are worked on; those of parts can be added up.

    `kinds` counts the captions of each kind, `records_with` the records that have one or more of them.
    `drops` are samples left out, by reason, `changes` records that are not quite their samples, `lost` what never
    became a sample.
    """

    def __init__(self):
        self.records = 0
        self.kinds: collections.Counter[str] = collections.Counter()
        self.records_with: collections.Counter[str] = collections.Counter()
        self.labels: set[str] = set()
        self.drops: dict[str, Tally] = {}
        self.changes: dict[str, Tally] = {}
        self.lost: dict[str, Loss] = {}
        self._bins = {name: [0] * (len(edges) - 1) for name, edges in _EDGES.items()}

    @property
    def samples(self) -> int:
        """How many came in: records, dropped and lost."""
        dropped = sum(tally.count for tally in self.drops.values())
        return self.records + dropped + sum(loss.samples for loss in self.lost.values())

    @property
    def histograms(self) -> dict[str, Histogram]:
        """Of the records' pictures: their shorter side, and width over height."""
        return {name: Histogram(edges, tuple(self._bins[name])) for name, edges in _EDGES.items()}

    def keep(
        self, captions: Mapping[str, str | list[str]], labels: Mapping[str, str], size: tuple[int, int] | None
    ) -> None:
        """Books a record; `size` is its picture's (width, height) where that is known."""
        self.records += 1
        for kind, texts in captions.items():
            if count := len(texts_of(texts)):
                self.kinds[kind] += count
                self.records_with[kind] += 1
        self.labels.update(labels)
        if size is not None:
            for name, value in ((SIDE, min(size)), (ASPECT, size[0] / size[1])):
                place = bisect.bisect_right(_EDGES[name], value) - 1
                self._bins[name][min(max(place, 0), len(self._bins[name]) - 1)] += 1

    def drop(self, reason: str, key: str) -> None:
        """Books the sample `key`, which is left out for `reason`."""
        self.drops[reason] = self.drops.get(reason, Tally()).plus(1, (_short(key),))

    def change(self, what: str, key: str) -> None:
        """Books that the record `key`, which is kept as well, is not quite its sample: `what` was done to it."""
        self.changes[what] = self.changes.get(what, Tally()).plus(1, (_short(key),))

    def lose(self, reason: str, samples: int, num_bytes: int, key: str | None) -> None:
        """Books `samples` that could not be read, the first of them `key`, and the bytes of input that held them."""
        keys = () if key is None else (_short(key),)
        self.lost[reason] = self.lost.get(reason, Loss()).plus(samples, num_bytes, keys)

    def add(self, other: Books) -> None:
        """Adds the books of the part that comes next: first keys stay those of the earlier part."""
        self.records += other.records
        self.kinds.update(other.kinds)
        self.records_with.update(other.records_with)
        self.labels |= other.labels
        for reason, tally in other.drops.items():
            self.drops[reason] = self.drops.get(reason, Tally()).plus(tally.count, tally.keys)
        for what, tally in other.changes.items():
            self.changes[what] = self.changes.get(what, Tally()).plus(tally.count, tally.keys)
        for reason, loss in other.lost.items():
            self.lost[reason] = self.lost.get(reason, Loss()).plus(loss.samples, loss.bytes, loss.keys)
        for name, counts in other._bins.items():
            self._bins[name] = [a + b for a, b in zip(self._bins[name], counts)]

    def to_tree(self) -> dict[str, Any]:
        """All of it for JSON, equal for equal books."""
        return {
            "records": self.records,
            "kinds": dict(sorted(self.kinds.items())),
            "records_with": dict(sorted(self.records_with.items())),
            "labels": sorted(self.labels),
            "drops": _trees(self.drops),
            "changes": _trees(self.changes),
            "lost": _trees(self.lost),
            "bins": self._bins,
        }

    @classmethod
    def from_tree(cls, tree: Mapping[str, Any]) -> Books:
        """The books of `to_tree`."""
        books = cls()
        books.records = tree["records"]
        books.kinds.update(tree["kinds"])
        books.records_with.update(tree["records_with"])
        books.labels = set(tree["labels"])
        books.drops = {reason: Tally.from_tree(entry) for reason, entry in tree["drops"].items()}
        books.changes = {what: Tally.from_tree(entry) for what, entry in tree["changes"].items()}
        books.lost = {reason: Loss.from_tree(entry) for reason, entry in tree["lost"].items()}
        books._bins = {name: list(tree["bins"][name]) for name in _EDGES}
        return books


def count_of(value: Any) -> int:
    """`value` if it is a whole number that numpy's int64 holds, from 0 on; raises `ValueError` for others."""
    return untrusted.as_int(value, 0, _MAX_COUNT)


def _trees(entries: Mapping[str, Tally | Loss]) -> dict[str, Any]:
    return {name: dataclasses.asdict(entry) for name, entry in sorted(entries.items())}


def _short(key: str) -> str:
    return key if len(key) <= _MOST_LETTERS else key[: _MOST_LETTERS - 3] + "..."
