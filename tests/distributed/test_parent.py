"""The parent of a single trainer, whose exit code launchers read. These trainers need no jax."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator

import pytest

from aimv2_jax.distributed.parent import run_trainer
from tests.helpers.tiny import ROOT

TRAINER = """
import os, signal, sys, time
from aimv2_jax.distributed import coordination as processes
trainer = processes.trainer()
assert trainer.process.count == 1
{code}
"""
PARENT = (
    "import sys; from aimv2_jax.distributed.parent import run_trainer; sys.exit(run_trainer(sys.argv[1:], 'nowhere'))"
)


def trainer(code: str) -> list[str]:
    return [sys.executable, "-c", TRAINER.format(code=code)]


@pytest.fixture(autouse=True)
def importable(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(ROOT))


@pytest.mark.parametrize(
    ("code", "expected", "words"),
    [
        ("sys.exit(trainer.run(lambda: 3, None))", 3, ""),
        ("os.kill(os.getpid(), signal.SIGKILL)", 75, "error: the trainer was ended by SIGKILL; run the same command"),
        ("os.abort()", 75, "ended by SIGABRT"),
        ("signal.signal(signal.SIGINT, signal.SIG_DFL); os.kill(os.getpid(), signal.SIGINT)", 130, ""),
        ("os.kill(os.getpid(), signal.SIGTERM)", 75, "stopped on request during startup or shutdown; run the same"),
        ("processes.report_hang(4, 'hung'); os.kill(os.getpid(), signal.SIGKILL)", 4, ""),
        ("processes.report_hang(4, 'hung'); os._exit(75)", 75, ""),  # The trainer chose its own code.
    ],
)
def test_exit_code_when_the_trainer_ends(tmp_path, capfd, code, expected, words):
    assert run_trainer(trainer(code), tmp_path) == expected
    said = capfd.readouterr().err
    assert words in said and bool(words) == bool(said)


def test_exit_code_when_killed_three_times(tmp_path, capfd):
    kill = trainer("os.kill(os.getpid(), signal.SIGKILL)")
    assert [run_trainer(kill, tmp_path) for _ in range(3)] == [75, 75, 4]
    assert "trainers were killed 3 times since the newest checkpoint. Check the" in capfd.readouterr().err


@contextlib.contextmanager
def in_time(process: subprocess.Popen) -> Iterator[None]:
    """Kills the process after a minute, so that its reader continues and the test fails."""
    timer = threading.Timer(60, process.kill)
    timer.start()
    yield
    timer.cancel()


@pytest.mark.parametrize("ignored", [False, True])
def test_signals_when_sent_to_the_parent(ignored):
    """SIGINT and SIGTERM are forwarded unchanged, SIGHUP as SIGTERM; under nohup, SIGHUP is ignored."""
    wait = """
got = []
for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
    signal.signal(number, lambda number, _: (got.append(number), print(signal.Signals(number).name, flush=True)))
print("ready", flush=True)
while len(got) < GOT:
    time.sleep(0.01)
sys.exit(75)
""".replace("GOT", "2" if ignored else "3")
    prelude = "import signal; signal.signal(signal.SIGHUP, signal.SIG_IGN); " if ignored else ""
    command = [sys.executable, "-c", prelude + PARENT, *trainer(wait)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as parent, in_time(parent):
        said = []
        for number in (signal.SIGHUP, signal.SIGINT, signal.SIGTERM):
            said.append(parent.stdout.readline().strip())
            if not (ignored and number == signal.SIGHUP):
                parent.send_signal(number)
            else:
                os.kill(parent.pid, number)
                parent.send_signal(signal.SIGINT)
                said.append(parent.stdout.readline().strip())
                parent.send_signal(signal.SIGTERM)
                break
        assert parent.wait(30) == 75
        said.append(parent.stdout.readline().strip())
    assert said == (["ready", "SIGINT", "SIGTERM"] if ignored else ["ready", "SIGTERM", "SIGINT", "SIGTERM"])


def test_trainer_when_its_parent_is_killed():
    wait = "print(os.getpid(), flush=True); time.sleep(60)"
    with subprocess.Popen([sys.executable, "-c", PARENT, *trainer(wait)], stdout=subprocess.PIPE, text=True) as parent:
        parent.stdout.readline()
        killed_s = time.monotonic()
        parent.kill()
        assert parent.stdout.read() == ""  # The end of the pipe shows that both processes are gone.
    assert time.monotonic() - killed_s < 30
