"""A root with two small sets, one of them in Table B1, and one that is only half there."""

from __future__ import annotations

import dataclasses
import json

import pytest

from aimv2_jax.data.dataset_info import write_dataset
from tests.helpers.trained_run import COLORS, records

NAMES = list(COLORS)


def labelled(numbers, label="class", classes=None):
    """Discs with their colour, or another of `classes`, as label."""
    classes = classes or NAMES
    for number, record in zip(numbers, records(numbers)):
        yield dataclasses.replace(record, labels={label: classes[number % len(classes)]})


def write_set(folder, description=None, train=range(40), test=range(40, 60), **options):
    """A set of discs in `folder`, with its `set.json` if there is a description."""
    write_dataset(folder / "train", labelled(train, **options))
    write_dataset(folder / "test", labelled(test, **options))
    if description is not None:
        (folder / "set.json").write_text(json.dumps(description))
    return folder


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("root")
    write_set(folder / "dtd")
    write_set(folder / "discs", {"title": "Discs", "label": "color"}, label="color")
    write_dataset(folder / "pets" / "train", labelled(range(9)))
    write_dataset(folder / "unknown" / "train", labelled(range(9)))
    return folder
