"""Tests of recorded hangs: which of them count, and which exit code follows."""

from __future__ import annotations

import pytest

from aimv2_jax import errors
from aimv2_jax.errors import EXIT_HUNG, EXIT_RETRY
from aimv2_jax.resilience.repeated_failures import RepeatedFailures


@pytest.fixture
def recorded(tmp_path):
    """A run that hung at the start, at step 12, and on another process at step 30."""
    for process, step, what in ((0, 0, "start"), (0, 12, "step"), (1, 30, "data")):
        RepeatedFailures(tmp_path, process).record(step, what, b"stacks")
    return tmp_path


def test_exit_code_when_a_step_hung_before(recorded):
    codes = {step: RepeatedFailures(recorded, 0).exit_code(step) for step in (0, 12, 13, 30)}
    assert codes == {0: EXIT_HUNG, 12: EXIT_HUNG, 13: EXIT_RETRY, 30: EXIT_HUNG}


def test_exit_code_when_a_later_step_is_saved(recorded):
    """Two hangs at the start with progress between them both count as the first one, on all processes."""
    failures = RepeatedFailures(recorded, 0)
    failures.retire(20)
    for process_failures in (failures, RepeatedFailures(recorded, 1)):
        assert [process_failures.exit_code(step) for step in (0, 12, 30)] == [EXIT_RETRY, EXIT_RETRY, EXIT_HUNG]
    failures.record(0, "start", b"stacks of another time")
    assert RepeatedFailures(recorded, 0).exit_code(0) == EXIT_HUNG
    names = sorted(file.name for file in (recorded / "hangs").iterdir())
    assert names == [
        "00000000-00000-start-before-00000020.txt",
        "00000000-00000-start.txt",
        "00000012-00000-step-before-00000020.txt",
        "00000030-00001-data.txt",
    ]


def test_retire_when_this_is_not_process_0(recorded):
    RepeatedFailures(recorded, 1).retire(20)
    assert RepeatedFailures(recorded, 1).exit_code(0) == EXIT_HUNG  # Only process 0 renames the files.


def test_records_when_a_part_or_nothing_is_there(tmp_path):
    assert RepeatedFailures(tmp_path, 0).exit_code(0) == EXIT_RETRY
    (tmp_path / "hangs").mkdir()
    (tmp_path / "hangs/00000013-00000-data.txt.part").touch()
    assert RepeatedFailures(tmp_path, 0).exit_code(13) == EXIT_RETRY


def test_exit_code_when_hung_is_no_other_code():
    taken = [value for name, value in vars(errors).items() if name.startswith("EXIT_")]
    assert EXIT_HUNG == 4 and len(set(taken)) == len(taken)
