"""The commands that prepare the sets of Table B1, on miniatures with their publishers' layouts."""

from __future__ import annotations

import re
import shlex

import pytest

from aimv2_jax.eval.suite.catalogue import find_sets
from aimv2_jax.eval.suite.paper_sets import PAPER_SETS
from aimv2_jax.eval.suite.source_labels import READERS
from aimv2_jax.eval.suite.source_labels import main as source_labels
from aimv2_jax.prepare.__main__ import main as prepare
from tests.helpers.paper_sources import SOURCES
from tests.helpers.preparing import records_of

COMMANDS = {"aimv2_jax.prepare": prepare, "aimv2_jax.eval.suite.source_labels": source_labels}


@pytest.mark.parametrize("paper", PAPER_SETS, ids=lambda paper: paper.name)
def test_commands_prepare_the_publisher_s_files(paper, tmp_path, monkeypatch, capsys):
    """Every image of the paper's splits has its class, no other image is there, and the suite reads the set."""
    expected = SOURCES[paper.name](tmp_path)
    monkeypatch.chdir(tmp_path)
    for command in paper.commands("data"):
        python, flag, module, *arguments = shlex.split(command)
        assert (python, flag) == ("python", "-m")
        code = COMMANDS[module]([*arguments, *(["--workers", "1"] if module == "aimv2_jax.prepare" else [])])
        assert code == 0, capsys.readouterr().err
    for split, examples in expected.items():
        records = records_of(tmp_path / "data" / paper.name / split)
        assert len(records) == len(examples)
        assert {record.image: record.labels for record in records} == {
            image: {"class": label} for image, label in examples.items()
        }
    [entry] = find_sets(tmp_path / "data").sets
    train, test = entry.read()
    assert train.names == test.names and len(train.names) == 2
    assert (len(train), len(test)) == tuple(map(len, expected.values()))


@pytest.mark.parametrize(
    ("name", "file", "text", "sentence"),
    [
        ("dtd", "dtd/labels/val1.txt", None, r"dtd: No such file or directory: '.*val1.txt'"),
        ("dtd", "dtd/labels/val1.txt", "banded_1.jpg\n", "another layout"),
        ("pets", "pets/annotations/test.txt", "Abyssinian_1.jpg\n", "a line without three numbers"),
        ("rxrx1", "rxrx1_v1.0/metadata.csv", "well,site\nB02,1\n", "lack a column or an entry: 'dataset'"),
        ("inaturalist18", "inat2018/val2018.json", '{"images": []}', "lack a column or an entry: 'annotations'"),
        ("inaturalist18", "inat2018/val2018.json", "[]", "another layout"),
        ("fmow", "fmow_v1.1/rgb_metadata.csv", "split,timestamp,category\ntrain,?,zoo\n", "another layout"),
        ("eurosat", "eurosat/eurosat-test.txt", "\n", "have no image of the split: 'test'"),
    ],
)
def test_lists_of_another_layout_are_refused(tmp_path, capsys, name, file, text, sentence):
    """A list that is missing, damaged or empty is one line, and no labels.csv is written."""
    SOURCES[name](tmp_path)
    folder = tmp_path / file.partition("/")[0]
    (tmp_path / file).unlink() if text is None else (tmp_path / file).write_text(text)
    assert source_labels([name, str(folder)]) == 2
    error = capsys.readouterr().err
    assert re.search(sentence, error) and len(error.splitlines()) == 1 and not (folder / "labels.csv").exists()


def test_sets_with_lists_have_a_reader():
    """`source_labels` reads exactly the sets whose commands begin with it."""
    assert [paper.name for paper in PAPER_SETS if paper.listed] == list(READERS)
