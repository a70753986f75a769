"""The event log: contents of a line, partial lines, and time accounting."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time

import jax.numpy as jnp
import numpy as np
import pytest

from aimv2_jax.errors import UserError
from aimv2_jax.monitoring.events import EventLog, TimeAccounting, TimeClass, process_age_s, read_events
from aimv2_jax.storage.files import atomic_write, read_bytes
from tests.helpers.full_disk import files_of_at_most

SAVE = dict(seconds=0.5)


def _text(folder):
    return (folder / "events.jsonl").read_bytes()


def test_events_of_two_starts_are_read_as_written(tmp_path):
    """Events of two starts keep their kinds, values, clocks and runs."""
    clock, wall = iter([10.0, 12.5, 20.0]), iter([100.0, 90.0])
    assert read_events(tmp_path) == []
    with EventLog(tmp_path / "new", age_s=4.0, clock=clock.__next__, wall=wall.__next__) as events:
        events.write("save", 20, seconds=jnp.float32(0.5))
        events.write("nonfinite", np.int64(21), loss=float("nan"), grad_norm=np.float32("inf"), file=tmp_path)
    with EventLog(tmp_path / "new") as events:
        events.write("spike", 3, values={"loss": np.float64(2), "window": (1, None)}, action="log")
    first, second, third = read_events(tmp_path / "new")
    assert (first.kind, first.step, first.time_s, first.clock_s, first.values) == ("save", 20, 100.0, 6.5, SAVE)
    assert (second.step, second.time_s, second.clock_s) == (21, 90.0, 14.0)
    assert second.values == {"loss": None, "grad_norm": None, "file": str(tmp_path)}
    assert third.values == {"values": {"loss": 2.0, "window": [1, None]}, "action": "log"}
    assert first.run == second.run != third.run


def test_last_event_is_ahead_of_a_clock_set_back(tmp_path):
    """The last event is ahead of the clock by as much as it was set back."""
    assert EventLog(tmp_path).ahead_s() == 0
    with EventLog(tmp_path, wall=lambda: 1000.0) as events:
        events.write("save", 20, **SAVE)
    with (tmp_path / "events.jsonl").open("a") as file:
        file.write('{"kind": "sa')  # A partial line, as after a kill.
    assert EventLog(tmp_path, wall=lambda: 900.0).ahead_s() == 100
    assert EventLog(tmp_path, wall=lambda: 1001.0).ahead_s() == 0


@pytest.mark.parametrize("kind, values", [("sav", SAVE), ("save", {}), ("save", {**SAVE, "more": 1})])
def test_unknown_kind_or_fields_are_a_bug(tmp_path, kind, values):
    """An event of an unknown kind, or with other fields than its kind has, is an error of ours and is not written."""
    with EventLog(tmp_path) as events, pytest.raises((ValueError, AssertionError)):
        events.write(kind, 1, **values)
    assert not (tmp_path / "events.jsonl").exists()


def test_write_when_on_another_process_then_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr("jax.process_index", lambda: 1)
    with EventLog(tmp_path) as events:
        events.write("save", 1, **SAVE)
        events.flush()
    assert not (tmp_path / "events.jsonl").exists()


def test_event_survives_a_kill_of_its_writer(tmp_path):
    """A line is in the file if its writer is killed right after the write."""
    code = (
        "import sys, os, time, jax\n"
        "from aimv2_jax.monitoring.events import EventLog\n"
        "events = EventLog(sys.argv[1])\n"
        "events.write('save', 7, seconds=0.5)\n"
        "print('written', flush=True)\n"
        "time.sleep(60)\n"
    )
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    with subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)], env=environment, stdout=subprocess.PIPE
    ) as process:
        assert process.stdout.readline() == b"written\n"
        process.send_signal(signal.SIGKILL)
    assert [event.step for event in read_events(tmp_path)] == [7]


def test_partial_line_of_any_length_before_a_start(tmp_path):
    """A partial line of any length loses and merges no event of the next start."""
    values = dict(values={"loss": 3.5, "why": 'a " and }}} and \\'}, action="log")
    with EventLog(tmp_path) as events:
        events.write("save", 1, **SAVE)
        events.write("spike", 2, **values)
    whole = _text(tmp_path)
    first = whole.index(b"\n") + 1
    for length in range(first, len(whole)):
        (tmp_path / "events.jsonl").write_bytes(whole[:length])
        steps = [event.step for event in read_events(tmp_path)]
        with EventLog(tmp_path) as events:
            events.write("save", 3, **SAVE)
        assert _text(tmp_path).startswith(whole[:length])  # Existing bytes are never cut.
        assert [event.step for event in read_events(tmp_path)] == [*steps, 3]
        assert steps == ([1, 2] if length == len(whole) - 1 else [1])


def test_partial_line_with_zeros_of_a_crash(tmp_path):
    """A partial line with the zeros that a crash of the machine leaves is skipped."""
    (tmp_path / "events.jsonl").write_bytes(b'{"kind": "sa' + bytes(20) + b"\n" + bytes(5))
    assert read_events(tmp_path) == []


@pytest.mark.parametrize(
    "line",
    [
        b"hello",
        b'{"kind": "save", "step": x}',
        b'{"kind": "save", "step": 1}',
        b'{"step": 1}',
        b"[1",
        b'{"kind": "save", "step": "1", "time": 1, "clock": 1, "run": "a"}',
    ],
)
def test_read_when_a_line_is_no_event(tmp_path, capsys, line):
    with EventLog(tmp_path) as events:
        events.write("save", 1, **SAVE)
    with (tmp_path / "events.jsonl").open("ab") as file:
        file.write(line + b"\n")
    with EventLog(tmp_path) as events:
        events.write("save", 2, **SAVE)
    assert [event.step for event in read_events(tmp_path)] == [1, 2]
    stderr = capsys.readouterr().err
    assert "events.jsonl:2 is skipped: it is not an event (" in stderr and stderr.count("\n") == 1


def test_full_disk_is_a_user_error(tmp_path):
    """A full disk raises UserError, and later lines are complete."""
    with EventLog(tmp_path) as events:
        events.write("save", 1, **SAVE)
        with files_of_at_most(len(_text(tmp_path))), pytest.raises(UserError, match="cannot be written"):
            events.write("save", 2, **SAVE)
        with (tmp_path / "events.jsonl").open("ab") as file:
            file.write(b'{"kind": "save", "st')  # The part that fitted on the disk.
        events.write("save", 3, **SAVE)
    assert [event.step for event in read_events(tmp_path)] == [1, 3]


def test_events_in_bucket_after_half_line(gcs_folder):
    """A half line of a killed process is separated from the next event in a bucket, too."""
    atomic_write(f"{gcs_folder}/events.jsonl", b'{"kind": "save", "step": 1')
    with EventLog(gcs_folder) as events:
        events.write("save", 2, **SAVE)
        events.flush()
        assert [event.step for event in read_events(gcs_folder)] == [2]
    assert json.loads(read_bytes(f"{gcs_folder}/events.jsonl").splitlines()[-1])["step"] == 2


def test_time_of_no_other_class_is_step_time():
    """Time outside all contexts is step time, and a context that raises counts."""
    now = [5.0]
    time_accounting = TimeAccounting(lambda: now[0])
    now[0] += 3
    with time_accounting.on(TimeClass.DATA):
        now[0] += 1
    with pytest.raises(ZeroDivisionError), time_accounting.on(TimeClass.EVALUATION):
        now[0] += 10
        raise ZeroDivisionError
    now[0] += 2
    assert time_accounting.seconds() == {"step_s": 5.0, "data_s": 1.0, "evaluation_s": 10.0, "saving_s": 0.0}


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="only Linux provides the start time of a process")
def test_process_age_grows_with_the_clock():
    """The age of the process is positive and grows with the clock."""
    before = process_age_s()
    time.sleep(0.1)
    assert before > 0 and 0.09 < process_age_s() - before < 5
