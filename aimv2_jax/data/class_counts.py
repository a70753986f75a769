"""Classes of a label in a dataset: their names in the order of their numbers, and the records of each."""

from __future__ import annotations

import collections
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

_MAX_LETTERS = 1 << 18  # A label whose values have more letters in all, for example URLs, has no classes. [O]
_MAX_DIGITS = 18


def class_order(names: Iterable[str]) -> list[str]:
    """Names of classes in their usual order: numbers by value, other names by their letters."""
    names = list(names)
    if all(name.isascii() and name.isdecimal() and len(name) <= _MAX_DIGITS for name in names):
        return sorted(names, key=lambda name: (int(name), name))
    return sorted(names)


class ClassCounts:
    """Counts the records of each class of one label; the counts of parts can be added.

    A source may declare its classes, in the order of their numbers. The classes of a label that no source declares are
    the values that its records have, in `class_order`.
    """

    def __init__(self):
        self._declared: tuple[str, ...] = ()
        self._counts: collections.Counter[str] | None = collections.Counter()  # None: the values are no classes.
        self._num_letters = 0

    def declare(self, names: Sequence[str]) -> None:
        """Adds the class list of a source. Sorted lists give a sorted one; otherwise, new names follow the others."""
        names = tuple(names)
        if names == self._declared:
            return
        is_sorted = all(list(part) == sorted(part) for part in (self._declared, names))
        union = dict.fromkeys((*self._declared, *names))
        self._declared = tuple(sorted(union) if is_sorted else union)

    def add(self, name: str, count: int = 1) -> None:
        """Counts records of the class `name`."""
        if self._counts is None:
            return
        if name not in self._counts:
            self._num_letters += len(name)
        self._counts[name] += count
        if self._num_letters > _MAX_LETTERS and not self._declared:
            self._counts = None

    def merge(self, other: ClassCounts) -> None:
        """Adds the counts of the part that follows this one."""
        if other._declared:
            self.declare(other._declared)
        if other._counts is None:
            self._counts = None
        for name, count in (other._counts or {}).items():
            self.add(name, count)

    def ordered(self) -> dict[str, int] | None:
        """Records by class, in the order of the classes' numbers; None for a label whose values are no classes."""
        if self._counts is None:
            return None
        others = class_order(self._counts.keys() - set(self._declared))
        return {name: self._counts[name] for name in (*self._declared, *others)}

    def to_tree(self) -> dict[str, Any]:
        """Returns the counts as a JSON tree; equal counts give equal trees."""
        return {"declared": list(self._declared), "counts": self.ordered()}

    @classmethod
    def from_tree(cls, tree: Mapping[str, Any]) -> ClassCounts:
        """Inverts `to_tree`."""
        classes = cls()
        classes._declared = tuple(tree["declared"])
        if tree["counts"] is None:
            classes._counts = None
        for name, count in (tree["counts"] or {}).items():
            if count:
                classes.add(name, count)
        return classes
