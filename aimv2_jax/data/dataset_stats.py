"""Dataset statistics. Every input sample is counted once: as a record, as dropped or as lost."""

from __future__ import annotations

import bisect
import collections
import dataclasses
import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from aimv2_jax import untrusted
from aimv2_jax.data.class_counts import ClassCounts
from aimv2_jax.data.records import texts_of

FIRST_KEYS = 10
_MAX_COUNT = (1 << 63) - 1  # The maximum of numpy's int64.
_MAX_KEY_LETTERS = 200  # Longer keys are truncated.

SIDE, ASPECT = "shorter_side_px", "aspect"
# Edges of the histograms' bins.
_EDGES = {
    # 16, 24, 32, 48, ..., 3072, 4096.
    SIDE: tuple(float(n) for k in range(4, 13) for n in (2**k, 3 * 2 ** (k - 1))[: 2 if k < 12 else 1]),
    # Width / height in quarter octaves; squares are in the middle of a bin. Rounded to be equal on all machines.
    ASPECT: tuple(round(2 ** ((k + 0.5) / 4), 4) for k in range(-19, 19)),
}


@dataclasses.dataclass(frozen=True)
class Histogram:
    """Counts of values in [edges[i], edges[i + 1]); the first and last bin also count values beyond the edges."""

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
class SampleCount:
    """Number of dropped or changed samples, and the first of their keys."""

    count: int = 0
    keys: tuple[str, ...] = ()

    def plus(self, count: int, keys: tuple[str, ...]) -> SampleCount:
        """Adds counts; keeps the first keys."""
        return SampleCount(self.count + count, (self.keys + keys)[:FIRST_KEYS])

    @classmethod
    def from_tree(cls, tree: Mapping[str, Any]) -> SampleCount:
        return cls(count_of(tree["count"]), tuple(tree["keys"]))


@dataclasses.dataclass(frozen=True)
class LostInput:
    """Unreadable input: samples (as far as known), bytes and the first keys."""

    samples: int = 0
    bytes: int = 0
    keys: tuple[str, ...] = ()

    def plus(self, samples: int, num_bytes: int, keys: tuple[str, ...]) -> LostInput:
        """Adds counts; keeps the first keys."""
        return LostInput(self.samples + samples, self.bytes + num_bytes, (self.keys + keys)[:FIRST_KEYS])

    @classmethod
    def from_tree(cls, tree: Mapping[str, Any]) -> LostInput:
        return cls(count_of(tree["samples"]), count_of(tree["bytes"]), tuple(tree["keys"]))


@dataclasses.dataclass(frozen=True)
class MapCount:
    """Second images of one name: how many have 8 bits and 16 bits a value, and the largest value of all."""

    bits_8: SampleCount = SampleCount()
    bits_16: SampleCount = SampleCount()
    max_value: int = 0

    @property
    def records(self) -> int:
        """Number of records that have one."""
        return self.bits_8.count + self.bits_16.count

    @classmethod
    def of(cls, values: np.ndarray, key: str) -> MapCount:
        """The count of the decoded map of record `key`."""
        one = SampleCount(1, (_shorten_key(key),))
        largest = int(values.max(initial=0))
        return cls(bits_16=one, max_value=largest) if values.dtype == np.uint16 else cls(one, max_value=largest)

    def plus(self, other: MapCount) -> MapCount:
        """Adds counts; keeps the first keys."""
        return MapCount(
            self.bits_8.plus(other.bits_8.count, other.bits_8.keys),
            self.bits_16.plus(other.bits_16.count, other.bits_16.keys),
            max(self.max_value, other.max_value),
        )

    @classmethod
    def from_tree(cls, tree: Mapping[str, Any]) -> MapCount:
        bits_8, bits_16 = (SampleCount.from_tree(tree[name]) for name in ("bits_8", "bits_16"))
        return cls(bits_8, bits_16, count_of(tree["max_value"]))


class DatasetStats:
    """Running statistics of a dataset in preparation; the statistics of its parts can be added.

    Attributes:
      records: number of records.
      kinds: number of captions of each kind.
      records_with: number of records that have a caption of the kind.
      labels: names of all labels.
      classes: classes of each label.
      images: second images of each name.
      drops: dropped samples, by reason.
      changes: records that differ from their samples, by change.
      lost: unreadable input, by reason.
    """

    def __init__(self):
        self.records = 0
        self.kinds: collections.Counter[str] = collections.Counter()
        self.records_with: collections.Counter[str] = collections.Counter()
        self.labels: set[str] = set()
        self.classes: dict[str, ClassCounts] = {}
        self.images: dict[str, MapCount] = {}
        self.drops: dict[str, SampleCount] = {}
        self.changes: dict[str, SampleCount] = {}
        self.lost: dict[str, LostInput] = {}
        self._bins = {name: [0] * (len(edges) - 1) for name, edges in _EDGES.items()}

    @property
    def samples(self) -> int:
        """Number of input samples: records, dropped samples and lost samples."""
        dropped = sum(drop.count for drop in self.drops.values())
        return self.records + dropped + sum(lost.samples for lost in self.lost.values())

    @property
    def histograms(self) -> dict[str, Histogram]:
        """Histograms of the records' images: shorter side, and width / height."""
        return {name: Histogram(edges, tuple(self._bins[name])) for name, edges in _EDGES.items()}

    def declare(self, label: str, names: Sequence[str]) -> None:
        """Adds the class list of a source for `label`, in the order of the classes' numbers."""
        self.classes.setdefault(label, ClassCounts()).declare(names)

    def keep(
        self,
        captions: Mapping[str, str | list[str]],
        labels: Mapping[str, str],
        size: tuple[int, int] | None,
        images: Mapping[str, MapCount] | None = None,
    ) -> None:
        """Counts a record; `size` is the (width, height) of its image, if known, `images` has its second images."""
        self.records += 1
        for kind, texts in captions.items():
            if count := len(texts_of(texts)):
                self.kinds[kind] += count
                self.records_with[kind] += 1
        self.labels.update(labels)
        for label, name in labels.items():
            self.classes.setdefault(label, ClassCounts()).add(name)
        for name, count in (images or {}).items():
            self.images[name] = self.images.get(name, MapCount()).plus(count)
        if size is not None:
            for name, value in ((SIDE, min(size)), (ASPECT, size[0] / size[1])):
                index = bisect.bisect_right(_EDGES[name], value) - 1
                self._bins[name][min(max(index, 0), len(self._bins[name]) - 1)] += 1

    def drop(self, reason: str, key: str) -> None:
        """Counts the sample `key` as dropped for `reason`."""
        self.drops[reason] = self.drops.get(reason, SampleCount()).plus(1, (_shorten_key(key),))

    def change(self, change: str, key: str) -> None:
        """Counts record `key` as changed by `change`; `keep` counts the record itself."""
        self.changes[change] = self.changes.get(change, SampleCount()).plus(1, (_shorten_key(key),))

    def lose(self, reason: str, samples: int, num_bytes: int, key: str | None) -> None:
        """Counts `samples` unreadable samples, which took `num_bytes` of input; `key` is the first one's, if known."""
        keys = () if key is None else (_shorten_key(key),)
        self.lost[reason] = self.lost.get(reason, LostInput()).plus(samples, num_bytes, keys)

    def add(self, other: DatasetStats) -> None:
        """Adds the statistics of the part that follows this one. The first keys of this part stay the first."""
        self.records += other.records
        self.kinds.update(other.kinds)
        self.records_with.update(other.records_with)
        self.labels |= other.labels
        for label, classes in other.classes.items():
            self.classes.setdefault(label, ClassCounts()).merge(classes)
        for name, count in other.images.items():
            self.images[name] = self.images.get(name, MapCount()).plus(count)
        for reason, drop in other.drops.items():
            self.drops[reason] = self.drops.get(reason, SampleCount()).plus(drop.count, drop.keys)
        for name, change in other.changes.items():
            self.changes[name] = self.changes.get(name, SampleCount()).plus(change.count, change.keys)
        for reason, lost in other.lost.items():
            self.lost[reason] = self.lost.get(reason, LostInput()).plus(lost.samples, lost.bytes, lost.keys)
        for name, counts in other._bins.items():
            self._bins[name] = [a + b for a, b in zip(self._bins[name], counts)]

    def to_tree(self) -> dict[str, Any]:
        """Returns the statistics as a JSON tree; equal statistics give equal trees."""
        return {
            "records": self.records,
            "kinds": dict(sorted(self.kinds.items())),
            "records_with": dict(sorted(self.records_with.items())),
            "labels": sorted(self.labels),
            "classes": {label: classes.to_tree() for label, classes in sorted(self.classes.items())},
            "images": _trees(self.images),
            "drops": _trees(self.drops),
            "changes": _trees(self.changes),
            "lost": _trees(self.lost),
            "bins": self._bins,
        }

    @classmethod
    def from_tree(cls, tree: Mapping[str, Any]) -> DatasetStats:
        """Inverts `to_tree`."""
        stats = cls()
        stats.records = tree["records"]
        stats.kinds.update(tree["kinds"])
        stats.records_with.update(tree["records_with"])
        stats.labels = set(tree["labels"])
        stats.classes = {label: ClassCounts.from_tree(classes) for label, classes in tree["classes"].items()}
        stats.images = {name: MapCount.from_tree(entry) for name, entry in tree["images"].items()}
        stats.drops = {reason: SampleCount.from_tree(entry) for reason, entry in tree["drops"].items()}
        stats.changes = {name: SampleCount.from_tree(entry) for name, entry in tree["changes"].items()}
        stats.lost = {reason: LostInput.from_tree(entry) for reason, entry in tree["lost"].items()}
        stats._bins = {name: list(tree["bins"][name]) for name in _EDGES}
        return stats


def count_of(value: Any) -> int:
    """Returns `value` if it is a non-negative integer within numpy's int64; raises `ValueError` otherwise."""
    return untrusted.as_int(value, 0, _MAX_COUNT)


def _trees(entries: Mapping[str, SampleCount | LostInput | MapCount]) -> dict[str, Any]:
    return {name: dataclasses.asdict(entry) for name, entry in sorted(entries.items())}


def _shorten_key(key: str) -> str:
    return key if len(key) <= _MAX_KEY_LETTERS else key[: _MAX_KEY_LETTERS - 3] + "..."
