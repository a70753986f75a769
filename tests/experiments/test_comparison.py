"""The tables of the comparison."""

import json

import pytest

from experiments.comparison_table import FLOOR, MODELS, markdown


@pytest.fixture
def folder(tmp_path):
    def figures(top1, names):
        by = {"clips": {"top1": top1, "examples": 3}, "photos": {"top1": 0.25, "examples": 4}}
        return {"top1": top1, "ci95": [top1 - 0.04, top1 + 0.05], "per_class": dict.fromkeys(names, top1), "by": by}

    for index, model in enumerate(MODELS):
        for name, names in ((model, "abc"), (f"{model}_without", "ab")):
            floor = figures(0.125 if name == model else 0.0625, names)
            probe = figures(0.5 + index / 100 - len(names) / 1000, names)
            (tmp_path / f"{name}.json").write_text(json.dumps({**probe, "floor": floor}))
    return tmp_path


def test_table_when_written_then_every_model_and_the_floor_with_all_and_without(folder):
    lines = markdown(folder).splitlines()
    assert lines[0] == "|  | 3 categories | 95 % | 2 categories | 95 % |"
    assert lines[2] == "| AIMv2, both captions | 0.497 | 0.457 to 0.547 | 0.498 | 0.458 to 0.548 |"
    assert lines[5].startswith("| the same architecture at random weights | 0.527 |")
    assert lines[6] == f"| {FLOOR} | 0.125 | 0.085 to 0.175 | 0.062 | 0.022 to 0.113 |"
    assert lines[8].split(" | ")[2:] == [*MODELS.values(), f"{FLOOR} |"]
    assert lines[10] == "| clips | 3 | 0.497 | 0.507 | 0.517 | 0.527 | 0.125 |"
    assert len(lines) == 12
