"""Supervisors with trainers that only sleep, fail and exit: the cause is reported once and all processes exit."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.helpers.several import free_port
from tests.helpers.tiny import ROOT

pytestmark = pytest.mark.xdist_group("processes")

COUNT = 3
SLEEP = "time.sleep(60)"


class Watched:
    """Several supervisors, three by default; the trainer of each runs `code`."""

    def __init__(self, folder: Path, code: str, timeout_s: int = 10, count: int = COUNT):
        self.folder = folder
        # Each trainer writes a file when it starts, so that tests do not act before that.
        code = f"open({str(folder)!r} + f'/at-work-{{index}}', 'w').write(str(__import__('os').getpid()))\n{code}"
        rest = [str(count), str(free_port()), str(folder), str(timeout_s), code]
        self.processes = [
            subprocess.Popen(
                [sys.executable, str(ROOT / "tests/helpers/watcher.py"), str(index), *rest],
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
            for index in range(count)
        ]

    def __enter__(self) -> Watched:
        return self

    def __exit__(self, *exception: object) -> None:
        for process in self.processes:
            process.kill()
            process.communicate()

    def trainers(self) -> list[int]:
        """Waits until all trainers run; returns their process ids."""
        files = [self.folder / f"at-work-{index}" for index in range(COUNT)]
        deadline_s = time.monotonic() + 60
        while not all(file.exists() and file.read_text() for file in files):
            assert time.monotonic() < deadline_s
            time.sleep(0.02)
        return [int(file.read_text()) for file in files]

    def ends(self) -> tuple[list[int], list[str]]:
        """Exit codes and error outputs of the supervisors."""
        said = [process.communicate(timeout=60)[1] for process in self.processes]
        return [process.returncode for process in self.processes], said

    def log(self, index: int) -> str:
        return (self.folder / f"logs/process_{index:05d}.log").read_text()


def test_end_when_all_finish_then_code_0_and_nothing_is_said(tmp_path):
    with Watched(tmp_path, "print('done', index)\nprint('aside', file=sys.stderr)") as watched:
        assert watched.ends() == ([0, 0, 0], ["aside\n", "", ""])
        for index in range(COUNT):
            assert f"done {index}\n" in watched.log(index) and "aside\n" in watched.log(index)


def test_end_when_all_stop_on_request_then_code_75_and_nothing_is_said(tmp_path):
    with Watched(tmp_path, "code = 75") as watched:
        assert watched.ends() == ([75, 75, 75], ["", "", ""])


def test_process_without_heartbeat(tmp_path):
    """If a process gives no sign of life, the other processes end in time and name it."""
    with Watched(tmp_path, SLEEP, timeout_s=4) as watched:
        watched.trainers()
        watched.processes[2].send_signal(signal.SIGSTOP)
        start_s = time.monotonic()
        for process in watched.processes[:2]:
            assert process.wait(20) == 75
        assert 1 < time.monotonic() - start_s < 4 + 1  # Allows one second for a busy machine.
        watched.processes[2].kill()
        for said in watched.ends()[1][:2]:
            assert said.startswith("error: process 2 on host-2 is missing (no heartbeat for")
            assert said.count("\n") == 1


@pytest.mark.parametrize(("victim", "number"), [(0, signal.SIGKILL), (1, signal.SIGKILL), (1, signal.SIGSEGV)])
def test_trainer_when_it_is_killed_then_all_end_and_name_it(tmp_path, victim, number):
    """The process of the killed trainer also exits with 75: launchers do not restart on other codes."""
    with Watched(tmp_path, SLEEP) as watched:
        os.kill(watched.trainers()[victim], number)
        codes, said = watched.ends()
    assert codes == [75] * COUNT
    for line in said:
        assert f"process {victim} on host-{victim} is missing (its trainer was ended by {number.name})" in line
        assert "Run the same command on all hosts to resume" in line


@pytest.mark.parametrize(("count", "kills", "code"), [(3, 0, 75), (2, 2, 4)])
def test_trainers_when_all_abort(tmp_path, count, kills, code):
    """jax aborts all when its coordinator loses one of them, or a stranger joins there."""
    (tmp_path / "kills.json").write_text(f'{{"newest_step": 0, "kills": {kills}}}')
    with Watched(tmp_path, "__import__('os').abort()", count=count) as watched:
        codes, said = watched.ends()
    assert codes == [code] * count
    assert all("is missing (its trainer was ended by SIGABRT" in line for line in said)


@pytest.mark.parametrize("victim", [0, 1])
def test_trainer_when_killed_again_and_again(tmp_path, victim):
    """The third kill without a new checkpoint ends the restarts: the run makes no progress."""
    (tmp_path / "checkpoints/5").mkdir(parents=True)
    (tmp_path / "kills.json").write_text('{"newest_step": 5, "kills": 2}')
    with Watched(tmp_path, SLEEP) as watched:
        os.kill(watched.trainers()[victim], signal.SIGKILL)
        codes, said = watched.ends()
    assert codes == [4] * COUNT
    for line in said:
        assert (
            f"process {victim} on host-{victim} is missing (its trainer was ended by SIGKILL; trainers were killed"
            in line
        )
        assert "3 times since the newest checkpoint); this ends the run. Check the system log" in line


def test_sigterm_before_trainer_listens(tmp_path):
    """If a trainer gets SIGTERM before it handles the signal, all processes end with code 75."""
    with Watched(tmp_path, SLEEP) as watched:
        watched.trainers()
        watched.processes[1].send_signal(signal.SIGTERM)
        codes, said = watched.ends()
    assert codes == [75, 75, 75]
    assert said == ["error: process 1 on host-1 ended with code 75: its trainer was ended by SIGTERM\n", "", ""]


def test_killed_process_named_not_failed_trainers(tmp_path):
    """If trainers fail because a process is killed, the error names that process and no failure."""
    fail = "time.sleep(60 if index == 2 else 0)\nraise RuntimeError('Connection closed by peer')"
    with Watched(tmp_path, fail) as watched:
        watched.trainers()
        time.sleep(1)  # Two trainers have failed by then.
        watched.processes[2].kill()
        codes, said = watched.ends()
    assert codes[:2] == [75, 75]
    assert all(line.startswith("error: process 2 on host-2 is missing") and line.count("\n") == 1 for line in said[:2])
    assert "RuntimeError: Connection closed by peer" in watched.log(1)  # The log has the traceback.


def test_user_error_in_one_process(tmp_path):
    """Process 0 prints a user error of another process, and all processes end with its code."""
    fail = "if index == 1:\n    raise UserError('data lost', '/there', 'Find it')\ntime.sleep(60)"
    with Watched(tmp_path, fail) as watched:
        codes, said = watched.ends()
    line = "error: process 1 on host-1 ended with code 2: error: data lost: '/there'. Find it.\n"
    assert codes == [2, 2, 2] and said == [line, "", ""]
    assert watched.log(1).endswith("error: data lost: '/there'. Find it.\n") and line in watched.log(2)


def test_end_when_storage_fails_one_process(tmp_path):
    """Only this process fails, with the code of a common stop; the others must not wait for it."""
    fail = "if index == 1:\n    raise StorageError('the disk is away')\ntime.sleep(60)"
    with Watched(tmp_path, fail) as watched:
        codes, said = watched.ends()
    line = "error: process 1 on host-1 ended with code 75: stopped: the disk is away. Start the same command again"
    assert codes == [75, 75, 75] and said[0].startswith(line) and said[1:] == ["", ""]


def test_guard_stops_all_processes(tmp_path):
    """If a guard stops all processes, process 0 alone prints the reason, and only once."""
    with Watched(tmp_path, "time.sleep(0.3 * (2 - index))\nraise TrainingAborted('loss is nan')") as watched:
        assert watched.ends() == ([3, 3, 3], ["stopped: loss is nan\n", "", ""])
        assert all("stopped: loss is nan" in watched.log(index) for index in range(COUNT))


def test_bug_in_one_process(tmp_path):
    """If a process has a bug, process 0 says which process, and the log of that process has the traceback."""
    with Watched(tmp_path, "if index == 2:\n    {}['key']\ntime.sleep(60)") as watched:
        codes, said = watched.ends()
    assert codes == [1, 1, 1]
    assert said == ["error: process 2 on host-2 ended with code 1: KeyError: 'key'\n", "", ""]
    assert "Traceback" in watched.log(2)


def test_end_when_process_0_has_the_bug_then_its_traceback_is_shown(tmp_path):
    with Watched(tmp_path, "if index == 0:\n    {}['key']\ntime.sleep(60)") as watched:
        codes, said = watched.ends()
    assert codes == [1, 1, 1] and said[1:] == ["", ""]
    assert said[0].startswith("Traceback") and said[0].endswith("KeyError: 'key'\n")


def test_trainer_when_its_watcher_is_killed_then_it_ends_too(tmp_path):
    with Watched(tmp_path, SLEEP) as watched:
        trainer = watched.trainers()[0]
        watched.processes[0].kill()
        deadline_s = time.monotonic() + 10
        while Path(f"/proc/{trainer}").exists() and "Z" not in Path(f"/proc/{trainer}/stat").read_text().split()[2]:
            assert time.monotonic() < deadline_s
            time.sleep(0.02)


def test_interrupt_of_one_watcher(tmp_path):
    """An interrupt of one watcher reaches its trainer once, and all processes end."""
    with Watched(tmp_path, SLEEP) as watched:
        watched.trainers()
        watched.processes[1].send_signal(signal.SIGINT)
        codes, said = watched.ends()
    assert codes == [130, 130, 130]
    assert said[0] == "error: process 1 on host-1 ended with code 130: interrupted\n"


def test_output_not_read(tmp_path):
    """A watcher continues to watch while no process reads its output."""
    code = "if index == 0:\n    print('x' * 1_000_000)\ntime.sleep(6)"
    with Watched(tmp_path, code, timeout_s=3) as watched:
        for process in watched.processes[1:]:
            assert process.wait(60) == 0
        out, err = watched.processes[0].communicate(timeout=60)
    assert out == "x" * 1_000_000 + "\n" and not err and watched.processes[0].returncode == 0


# A trainer as the watchdog ends it: first the report, then the stacks, then the exit; the others wait in a collective.
HANGS = """
import faulthandler, json, os, signal
faulthandler.register(signal.SIGUSR1, 2, all_threads=True)

def in_a_collective():
    time.sleep(60)

while len([name for name in os.listdir(FOLDER) if name.startswith("at-work")]) < 3:
    time.sleep(0.02)
if index == VICTIM:
    time.sleep(0.5)  # By then the others have started.
    said = [{"code": CODE, "text": "hung: at step 7", "hung": True}, {"code": 1, "text": "and then failed"}]
    trainer.channel.sendall(b"".join(json.dumps(line).encode() + b"\\n" for line in said))
    time.sleep(1.5)
    print("stacks of the one that hangs", file=sys.stderr)
    os._exit(CODE)
in_a_collective()
"""


def hangs(folder: Path, victim: int | str, code: int) -> str:
    return HANGS.replace("FOLDER", repr(str(folder))).replace("VICTIM", str(victim)).replace("CODE", str(code))


@pytest.mark.parametrize(("victim", "code"), [(0, 75), (1, 4)])
def test_one_trainer_hangs(tmp_path, victim, code):
    """If a trainer hangs, the others write their stacks and all processes end with its code."""
    with Watched(tmp_path, hangs(tmp_path, victim, code)) as watched:
        codes, said = watched.ends()
    assert codes == [code] * COUNT
    line = f"process {victim} on host-{victim} ended with code {code}: hung: at step 7"
    for index in range(COUNT):
        log = watched.log(index)
        assert ("in in_a_collective" in log) == (index != victim)
        assert ("stacks of the one that hangs" in log) == (index == victim)
        assert "hung: at step 7" in log if index == victim else line in log
    assert "hung: at step 7" in said[0] and said[1:] == ["", ""]


def test_all_trainers_hang(tmp_path):
    """If all trainers hang at once, each writes its stacks and all processes end with one code."""
    with Watched(tmp_path, hangs(tmp_path, "index", 75)) as watched:
        codes, _ = watched.ends()
    assert codes == [75] * COUNT
    assert all("stacks of the one that hangs" in watched.log(index) for index in range(COUNT))


def test_end_when_a_device_of_one_fails(tmp_path):
    """Its code 75 is not a common stop: the others are ended, and the message names the process of the device."""
    fails = "from aimv2_jax.errors import DeviceFailure\nif index == 1: raise DeviceFailure('a device failed', 75)\n"
    with Watched(tmp_path, fails + SLEEP) as watched:
        codes, said = watched.ends()
    assert codes == [75] * COUNT
    assert said[0] == "error: process 1 on host-1 ended with code 75: error: a device failed\n"


HANGS_IN_C = """
import ctypes
from types import SimpleNamespace
from aimv2_jax.resilience.watchdog import WATCHED, Watchdog, register_dump_signal
register_dump_signal()
if index == 1:
    limits = SimpleNamespace(**{f"{name}_s": 1 for name in WATCHED})
    dog = Watchdog(FOLDER, index, limits, notify=processes.report_hang, channel=processes.channel())
    with dog.watching("step", 7):
        time.sleep(0.5)
        mutex = ctypes.create_string_buffer(64)
        [ctypes.PyDLL(None).pthread_mutex_lock(mutex) for _ in range(2)]
time.sleep(60)
"""


def test_end_when_a_trainer_hangs_in_c(tmp_path):
    """Its heartbeat's monitor reports the hang to the supervisors, as if the trainer had done so itself."""
    with Watched(tmp_path, HANGS_IN_C.replace("FOLDER", repr(str(tmp_path)))) as watched:
        codes, said = watched.ends()
    assert codes == [75] * COUNT
    assert "process 1 on host-1 ended with code 75: hung: process 1" in said[0] and "keeps Python's lock" in said[0]
    assert all("most recent call first" in watched.log(index) for index in range(COUNT))
