"""Tests of the watchdog: hanging processes end in time with the stacks of all threads; others are not affected."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from aimv2_jax.distributed.parent import run_trainer
from aimv2_jax.resilience import watchdog
from aimv2_jax.resilience.watchdog import Watchdog
from tests.helpers.tiny import ROOT

NEVER = {f"{what}_s": 0 for what in watchdog.WATCHED}
# Runs CODE in a function whose name must appear in the stacks, while another thread sleeps.
PROGRAM = """
import ctypes, os, signal, sys, threading, time
from types import SimpleNamespace
from aimv2_jax.resilience import watchdog
from aimv2_jax.resilience.watchdog import Watchdog, register_dump_signal

NEVER = {f"{what}_s": 0 for what in watchdog.WATCHED}
workdir = sys.argv[1]


def aside():
    time.sleep(60)


def dog(**settings):
    calls = {name: settings.pop(name) for name in ("on_hang", "notify", "channel") if name in settings}
    return Watchdog(workdir, 3, SimpleNamespace(**NEVER | settings), **calls)


def here():
    CODE


threading.Thread(target=aside, name="another", daemon=True).start()
here()
"""


def run(code: str, workdir: Path, seconds: float = 20) -> tuple[int, str, str, float]:
    """Runs `code` in a process; returns its exit code, output, errors and duration."""
    program = PROGRAM.replace("CODE", code.replace("\n", "\n    "))
    start_s = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", program, str(workdir)],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=seconds,
    )
    return done.returncode, done.stdout, done.stderr, time.monotonic() - start_s


HANG = 'with dog(step_s=1) as d, d.watching("step", 12, lambda: "record 5 of red"):\n    time.sleep(60)'


def test_hang_of_step_dumps_stacks(tmp_path):
    """A step that takes too long ends the run with code 75 and all stacks in the log and the workdir."""
    code, _, log, seconds = run(HANG, tmp_path)
    assert code == 75 and seconds < 1 + 2
    [file] = (tmp_path / "hangs").iterdir()
    assert file.name == "00000012-00003-step.txt"
    for text in (log, file.read_text()):
        assert re.search(r"hung: process 3 on \S+ has waited for step at step 12 for 1 s", text)
        assert "record 5 of red" in text and "is another\n" in text
        assert re.search(r'line \d+ in here\n  File ".*", line \d+ in <module>', text) and "in aside\n" in text


def test_hang_when_it_is_at_the_step_of_an_earlier_one_then_code_4_and_at_another_75(tmp_path):
    (tmp_path / "hangs").mkdir()
    (tmp_path / "hangs/00000012-00000-data.txt").touch()
    code, _, log, _ = run(HANG, tmp_path)
    assert code == 4 and "step 12 for 1 s, as before" in log
    assert run(HANG.replace("12", "13"), tmp_path)[0] == 75


def test_hang_of_outer_context(tmp_path):
    """An inner context that is entered without end is ended by the outer one, and the callbacks are called."""
    code, out, _, _ = run(
        """def show(*values):
    print(*values, flush=True)
with dog(evaluation_s=1, data_s=1, on_hang=lambda h: show(h.what, h.step, h.code), notify=show) as d:
    with d.watching("evaluation", 4):
        while True:
            with d.watching("data", 4):
                time.sleep(0.05)""",
        tmp_path,
    )
    notification, hang = out.splitlines()
    assert code == 75 and hang == "evaluation 4 75"
    assert notification.startswith("75 hung: process 3 on ") and "has waited for evaluation" in notification


def test_hang_when_the_disk_and_the_callbacks_hang_too_then_it_ends_all_the_same(tmp_path):
    forever = "lambda *_: time.sleep(60)"
    code, _, log, seconds = run(
        f"""from aimv2_jax.resilience import repeated_failures
watchdog._CALL_TIMEOUT_S, repeated_failures.atomic_write = 0.5, {forever}
with dog(save_s=1, on_hang={forever}, notify={forever}) as d, d.watching("save", 1, {forever}):
    time.sleep(60)""",
        tmp_path,
    )
    assert code == 75 and seconds < 6 and "in aside" in log


def test_hang_when_even_the_log_is_not_read_then_it_ends_all_the_same(tmp_path):
    code = f"watchdog._END_TIMEOUT_S = 1\nos.write(1, b'!')\n{HANG}".replace("\n", "\n    ")
    read, write = os.pipe()
    os.set_blocking(write, False)
    try:
        while True:
            os.write(write, b"x" * 4096)
    except BlockingIOError:
        os.set_blocking(write, True)
    command = [sys.executable, "-c", PROGRAM.replace("CODE", code), str(tmp_path)]
    process = subprocess.Popen(
        command, env=os.environ | {"PYTHONPATH": str(ROOT)}, stderr=write, stdout=subprocess.PIPE
    )
    try:
        assert process.stdout.read(1) == b"!" and process.wait(10) == 75
    finally:
        process.kill()
        process.stdout.close()
        os.close(read), os.close(write)


# Holds the GIL for good: PyDLL calls C without releasing it, and a mutex locked twice waits for ever. A sleep would be
# interrupted by the signal for the stacks.
HOLD_GIL = """
from aimv2_jax.distributed import coordination
coordination.trainer()
register_dump_signal()
with dog(step_s=1, channel=coordination.channel()) as d, d.watching("step", 12):
    time.sleep(0.5)
    mutex = ctypes.create_string_buffer(64)
    ctypes.PyDLL(None).pthread_mutex_lock(mutex), ctypes.PyDLL(None).pthread_mutex_lock(mutex)"""


def test_hang_when_c_keeps_pythons_lock(tmp_path, monkeypatch, capfd):
    """The heartbeat process has the stacks written, records the hang and kills it; the exit code is 75, then 4."""
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    command = [sys.executable, "-c", PROGRAM.replace("CODE", HOLD_GIL.replace("\n", "\n    ")), str(tmp_path)]
    for code, again in ((75, ""), (4, ", as before")):
        start_s = time.monotonic()
        assert run_trainer(command, tmp_path) == code
        assert time.monotonic() - start_s < 15  # 4 s on an idle machine.
        log = capfd.readouterr().err
        text = (
            rf"hung: process 3 on \S+ has waited for step at step 12 for \d s{again}; some C code keeps Python's lock"
        )
        assert re.search(text, log) and "in here\n" in log and "in aside\n" in log
        [file] = (tmp_path / "hangs").iterdir()
        assert file.name == "00000012-00003-step.txt" and re.match(text, file.read_text())


def test_heartbeat_when_nothing_is_watched(tmp_path):
    """C code that takes the GIL at such a moment is still detected, after the longest of all limits."""
    with Watchdog(tmp_path, 0, SimpleNamespace(**NEVER | {"data_s": 20, "save_s": 600})) as dog:
        assert dog._heartbeat([], 0.0).limit_s == 1.5 * 600
        with dog.watching("data", 3) as watch:
            assert dog._heartbeat([watch], watch.since_s).limit_s == 1.5 * 20
    with Watchdog(tmp_path, 0, SimpleNamespace(**NEVER)) as dog:
        assert dog._heartbeat([], 0.0).limit_s == 0


def test_monitor_when_it_is_killed(tmp_path):
    """The watchdog works without it."""
    code = """with dog(step_s=1) as d, d.watching("step", 12):
    os.kill(d._monitor._process.pid, signal.SIGKILL)
    time.sleep(60)"""
    assert run(code, tmp_path)[0] == 75


def test_watchdog_when_nothing_hangs_then_it_is_not_heard(tmp_path):
    settings = SimpleNamespace(**NEVER | {"data_s": 0.5, "step_s": 0.5})
    with Watchdog(tmp_path, 0, settings) as dog:
        with dog.watching("evaluation", 1):  # Evaluation has no limit.
            for step in range(12):
                with dog.watching("data", step), dog.watching("step", step):
                    time.sleep(0.1)
            time.sleep(0.8)
        with pytest.raises(KeyError), dog.watching("save", 1):
            raise KeyError
        assert not dog._open
    assert not list(tmp_path.iterdir())
    assert "watchdog" not in {thread.name for thread in threading.enumerate()}


HELD_UP = """watchdog._MAX_CHECK_DELAY_S = 0.5
with dog(step_s=1) as d, d.watching("step", 1):
    print(os.getpid(), flush=True)
    time.sleep(0.5)
    print("went on", flush=True)"""


def test_watchdog_when_the_process_was_suspended(tmp_path):
    """Suspended for three times the heartbeat's limit, alone or with the heartbeat process, as schedulers do.

    `kill -STOP` sends SIGSTOP to one process; Slurm's suspend and cgroup's freezer stop all processes of a job.
    """
    program = PROGRAM.replace("CODE", HELD_UP.replace("\n", "\n    "))
    command = [sys.executable, "-c", program, str(tmp_path)]
    options = dict(env=os.environ | {"PYTHONPATH": str(ROOT)}, stdout=subprocess.PIPE, text=True)
    with contextlib.ExitStack() as stack:
        sends = {}
        for send in (os.kill, os.killpg):
            process = stack.enter_context(subprocess.Popen(command, start_new_session=True, **options))
            process.stdout.readline()
            send(process.pid, signal.SIGSTOP)
            sends[process] = send
        time.sleep(4.5)
        for process, send in sends.items():
            send(process.pid, signal.SIGCONT)
        for process in sends:
            assert process.stdout.readline() == "went on\n" and process.wait(10) == 0
    assert not list(tmp_path.iterdir())


def test_dump_signal_writes_stacks(tmp_path):
    """The dump signal writes the stacks, and the process continues."""
    code = "register_dump_signal()\nos.kill(os.getpid(), signal.SIGUSR1)\ntime.sleep(0.1)\nprint('went on')"
    code, out, log, _ = run(code, tmp_path)
    assert (code, out) == (0, "went on\n") and "in here" in log and "in aside" in log


def test_watching_when_nothing_hangs_then_it_costs_microseconds(tmp_path):
    with Watchdog(tmp_path, 0, SimpleNamespace(**NEVER | {"data_s": 600})) as dog:
        start_s = time.perf_counter()
        for step in range(10_000):
            with dog.watching("data", step):
                pass
    assert (time.perf_counter() - start_s) / 10_000 < 50e-6  # 1 to 2 µs on an idle machine.


def test_limits_when_a_name_is_unknown_then_our_bug(tmp_path):
    with Watchdog(tmp_path, 0, SimpleNamespace(**NEVER)) as dog, pytest.raises(KeyError):
        dog.watching("lunch", 1)
