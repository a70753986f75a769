"""Classes of a label: their order, and the records of each."""

from __future__ import annotations

import json

import pytest

from aimv2_jax.data import class_counts
from aimv2_jax.data.class_counts import ClassCounts, class_order


def counted(names, *lists):
    classes = ClassCounts()
    for declared in lists:
        classes.declare(declared)
    for name in names:
        classes.add(name)
    return classes


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        ("cba", ["a", "b", "c"]),
        (["10", "9", "1"], ["1", "9", "10"]),
        (["10", "9", "x"], ["10", "9", "x"]),
        (["1", "01"], ["01", "1"]),
        (["²", "1"], ["1", "²"]),
        (["9" * 5000, "1"], ["1", "9" * 5000]),
        ([], []),
    ],
)
def test_class_order_is_by_value_or_by_letters(names, expected):
    """Numbers are sorted by value if all names are numbers, everything else by its letters."""
    assert class_order(names) == class_order(names[::-1]) == expected


def test_declared_classes_keep_their_numbers():
    """Declared classes keep their order, one without a record has 0, and undeclared ones follow."""
    assert list(counted("zaa", ["b", "a"]).ordered().items()) == [("b", 0), ("a", 2), ("z", 1)]


@pytest.mark.parametrize(
    ("lists", "expected"),
    [(["ac", "b"], "abc"), (["cb", "ad"], "cbad"), (["ba", "ba"], "ba"), (["b", "a", "c"], "abc"), (["ba", "a"], "ba")],
)
def test_lists_of_several_sources_are_united(lists, expected):
    """Sorted lists give a sorted one, as the folders of classes do; others are continued by new names."""
    assert list(counted("", *lists).ordered()) == list(expected)


def test_counts_of_parts_are_those_of_the_whole():
    """The counts of two parts, each through JSON, add up to those of the whole."""
    first, second = counted("aab", ["b", "a"]), counted("bc", ["b", "a", "d"])
    whole = counted("aabbc", ["b", "a"], ["b", "a", "d"])
    first, second = (ClassCounts.from_tree(json.loads(json.dumps(part.to_tree()))) for part in (first, second))
    first.merge(second)
    assert first.to_tree() == whole.to_tree()
    assert first.ordered() == {"b": 2, "a": 2, "d": 0, "c": 1}


def test_values_that_are_no_classes_are_not_listed(monkeypatch):
    """A label with very many values is no class, in whichever part they are; a declared one has no limit."""
    monkeypatch.setattr(class_counts, "_MAX_LETTERS", 10)
    many = counted(["abcdef", "ghijkl"])
    assert many.ordered() is None and counted(["abcdef"] * 9).ordered() == {"abcdef": 9}
    assert counted(["abcdef", "ghijkl"], ["abcdef"]).ordered() == {"abcdef": 1, "ghijkl": 1}
    for parts in ((many, counted("a")), (counted("a"), many), (counted(["abcdef"]), counted(["ghijkl"]))):
        first, second = (ClassCounts.from_tree(part.to_tree()) for part in parts)
        first.merge(second)
        assert first.ordered() is None and ClassCounts.from_tree(first.to_tree()).ordered() is None
