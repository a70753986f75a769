"""Trainers that were killed are counted from one checkpoint to the next."""

from __future__ import annotations

import pytest

from aimv2_jax.parallel import kills
from aimv2_jax.parallel.kills import count_kill
from aimv2_jax.train.step_folders import FOLDER


def test_kills_when_a_checkpoint_comes_between(tmp_path):
    assert [count_kill(tmp_path), count_kill(tmp_path)] == [1, 2]
    (tmp_path / FOLDER / "50").mkdir(parents=True)
    (tmp_path / FOLDER / "100.orbax-checkpoint-tmp-saving").mkdir()  # None yet.
    assert [count_kill(tmp_path), count_kill(tmp_path), count_kill(tmp_path)] == [1, 2, 3]
    (tmp_path / FOLDER / "100").mkdir()
    assert count_kill(tmp_path) == 1


@pytest.mark.parametrize(
    "content", ["", "[" * 100_000, "[]", '{"newest_step": 0}', '{"newest_step": 0, "kills": "many"}', "\xff"]
)
def test_kills_when_the_file_is_damaged(content, tmp_path):
    (tmp_path / kills.FILE).write_text(content, "latin-1")
    assert [count_kill(tmp_path), count_kill(tmp_path)] == [1, 2]


def test_kills_when_the_workdir_is_gone(tmp_path):
    assert count_kill(tmp_path / "none") == 1
