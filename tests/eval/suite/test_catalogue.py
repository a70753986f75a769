"""Sets under a root: which are there, which are missing, and what is wrong with one."""

from __future__ import annotations

import json
import re
import shutil

import pytest

from aimv2_jax.errors import UserError
from aimv2_jax.eval.suite.catalogue import find_sets, missing_lines
from aimv2_jax.eval.suite.paper_sets import PAPER_SETS, paper_scores
from tests.eval.suite.conftest import NAMES, write_set


def test_paper_sets_are_those_of_table_b1():
    """Fourteen sets with the sums of Table B1's columns, and of the accuracies of each model in Table B2."""
    assert len({paper.name for paper in PAPER_SETS}) == 14
    assert sum(paper.train for paper in PAPER_SETS) == 2_644_292
    assert sum(paper.test for paper in PAPER_SETS) == 251_689
    assert sum(paper.classes for paper in PAPER_SETS) == 11_193
    sums = [sum(paper.scores[size] for paper in PAPER_SETS) for size in range(4)]
    assert sums == pytest.approx([1146.8, 1155.2, 1163.3, 1168.7])
    assert paper_scores(PAPER_SETS[0], 448) == (448, (87.9, 88.6, 89.0, 89.5))
    assert paper_scores(PAPER_SETS[1], 448) == (224, PAPER_SETS[1].scores)


def test_sets_found_missing_and_ignored(root):
    """Sets of Table B1 come first; missing ones are named with their source and the commands that prepare them."""
    catalogue = find_sets(root)
    assert [entry.name for entry in catalogue.sets] == ["dtd", "pets", "discs"]
    assert [entry.title for entry in catalogue.sets] == ["DTD", "Pets", "Discs"]
    assert len(catalogue.missing) == 12 and catalogue.ignored == ("unknown",)
    [line] = [line for line in missing_lines(catalogue, "data") if line.startswith("CIFAR-100")]
    for part in (
        "huggingface.co/datasets/uoft-cs/cifar100",
        "python -m aimv2_jax.prepare --input 'cifar100' --split train --label class=fine_label "
        "--output data/cifar100/train",
        "--split test --label class=fine_label --output data/cifar100/test",
    ):
        assert part in line


def test_set_labels_and_classes(root):
    """A set is read with the label of its description, or the only label; numbers differ from the paper's."""
    dtd, _, discs = find_sets(root).sets
    train, test = discs.read()
    assert (len(train), len(test), train.names) == (40, 20, tuple(sorted(NAMES)))
    assert dtd.read()[0].names == train.names
    notes = dtd.size_notes(40, 20, 3)
    assert notes == ["40 train images (paper: 3,760)", "20 test images (paper: 1,880)", "3 classes (paper: 47)"]
    assert dtd.size_notes(3760, 1880, 47) == [] and discs.size_notes(40, 20, 3) == []


def test_set_identity_changes_with_its_data(root, tmp_path):
    """Another dataset or description has another identity."""
    entry = find_sets(root).sets[0]
    write_set(tmp_path / "dtd", train=range(39))
    assert find_sets(tmp_path).sets[0].identity() != entry.identity()
    shutil.rmtree(tmp_path / "dtd")
    write_set(tmp_path / "dtd")
    assert find_sets(tmp_path).sets[0].identity() == entry.identity()
    (tmp_path / "dtd/set.json").write_text('{"without": ["red"]}')
    assert find_sets(tmp_path).sets[0].identity() != entry.identity()


@pytest.mark.parametrize(
    ("name", "options", "sentence"),
    [
        ("dtd", dict(test=range(40, 60), classes=["a", "b"]), None),
        ("dtd", dict(classes=["a"]), "has only one class: 'a'"),
        ("dtd", dict(test=range(45, 60), train=range(40, 44)), "a class that --train lacks"),
        ("pcam", dict(classes=["0", "1", "7"]), "a label outside of its 2 classes of Table B1: '7'"),
        ("pcam", dict(classes=["0", "1", "-1"]), "a label outside of its 2 classes of Table B1: '-1'"),
        ("pcam", dict(classes=["a", "b", "c"]), "more than its 2 classes of Table B1: 3"),
        ("mine", dict(description={"label": "kind"}), "no record with this label: 'kind'"),
        ("mine", dict(description={"lable": "kind"}), "has an unknown key: 'lable'. Its keys are title"),
        ("mine", dict(description={"label": 3}), "label is not a text: 3"),
        ("mine", dict(description={"without": "red"}), "without is not a list of texts: 'red'"),
        ("mine", dict(description=[]), "the set's description is not JSON"),
    ],
)
def test_bad_set_is_one_sentence(tmp_path, name, options, sentence):
    """A set that cannot be used raises a UserError that says why."""
    if options.get("train") is not None:
        options = options | {"train": [number for number in options["train"] if number % 3 != 2]}
    write_set(tmp_path / name, **options)

    def read():
        return find_sets(tmp_path).sets[0].read()

    if sentence is None:
        assert read()[0].names == ("a", "b")
        return
    with pytest.raises(UserError, match=re.escape(sentence)):
        read()


@pytest.mark.parametrize(("split", "other"), [("train", "test"), ("test", "train")])
def test_half_a_set_is_named_with_its_command(tmp_path, split, other):
    """A set without one of its datasets is refused with the command that prepares it."""
    write_set(tmp_path / "food101")
    shutil.rmtree(tmp_path / "food101" / split)
    with pytest.raises(UserError, match=f"food101 is only half there: {split} is no prepared dataset") as error:
        find_sets(tmp_path).sets[0].identity()
    assert f"--output {tmp_path}/food101/{split}" in str(error.value)
    write_set(tmp_path / "own", {})
    (tmp_path / "own" / split / "dataset.json").unlink()
    with pytest.raises(UserError, match=f"{split} is no prepared dataset.*Prepare it beside {other}"):
        find_sets(tmp_path).sets[1].identity()


def test_root_without_sets(tmp_path):
    """A root that is missing, or has no set, is refused with what to do."""
    with pytest.raises(UserError, match="no such folder"):
        find_sets(tmp_path / "none")
    write_set(tmp_path / "anything")
    with pytest.raises(UserError, match=r"--data has no set.*describe yours by NAME/set.json"):
        find_sets(tmp_path)
    (tmp_path / "anything/set.json").write_text(json.dumps({"title": "Any"}))
    assert find_sets(tmp_path).sets[0].title == "Any"
