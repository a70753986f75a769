"""Short form of the drill with damaged checkpoints: tests/stress/corrupt.py."""

from __future__ import annotations

import random

import pytest

from aimv2_jax.checkpoint import manifest
from tests.stress import corrupt


def test_steps_when_files_are_damaged_20_times_then_all_are_found_named_and_set_aside(tmp_path):
    done = corrupt.drill(20, seed=1, folder=tmp_path)
    assert len(done) == 20 and {injection.way for injection in done} == set(corrupt.WAYS)
    assert len({injection.kind for injection in done}) > 8


def test_drill_when_files_are_not_compared_then_it_fails(tmp_path, monkeypatch):
    monkeypatch.setattr(manifest, "compare", lambda *_: [])
    with pytest.raises(AssertionError, match="injection 1"):
        corrupt.drill(1, seed=3, folder=tmp_path)


@pytest.mark.parametrize("way", corrupt.WAYS)
def test_injection_when_done_then_the_files_it_tells_are_those_that_differ(tmp_path, way):
    names = ("manifest.json", "state/d/" + 32 * "0", "state/d/" + 32 * "1")
    for name in names:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(f"what is in {name}")
    before = corrupt.files_of(tmp_path)
    injection = corrupt.inject(tmp_path, "state/d/*", way, random.Random(0))
    after = corrupt.files_of(tmp_path)
    differ = {name for name in before | after if before.get(name) != after.get(name)}
    assert differ == set(injection.files) and len(differ) == (2 if way == "swap" else 1)
