"""Workers: their imports, and that they and their resources never outlive the trainer."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

# Tests with worker processes run serially: in parallel they would starve the tests that measure time.
pytestmark = pytest.mark.xdist_group("data workers")

TRAINER = '''
import dataclasses, json, os, sys, time

from aimv2_jax.data.loading.batch_builder import LocalBatch


@dataclasses.dataclass(frozen=True)
class Report:
    """Builds a batch, and describes its process in the caption."""

    build: object

    def __call__(self, step, status):
        batch = self.build(step, status)
        bridge = sys.modules.get("jax._src.xla_bridge")
        facts = {
            "pid": os.getpid(),
            "modules": [m for m in ("tensorflow", "tensorflow_text", "flax") if m in sys.modules],
            "backends": list(bridge._backends) if bridge else [],
            "platforms": sys.modules["jax"].config.jax_platforms,
            "padding": "-" * 100_000,  # More than a pipe holds.
        }
        return LocalBatch(step, batch.arrays, [json.dumps(facts).encode()], batch.faults)


def main():
    from aimv2_jax.config.schema import BatchShape
    from aimv2_jax.data import pipeline
    from aimv2_jax.data.sources import open_datasets

    sources = open_datasets({"photo": "package:data/sample/train/photo"})
    schedule = pipeline.BatchSchedule(0, [BatchShape(64, 64)])
    build = pipeline.TrainingBatches(
        pipeline.MixtureSampler(0, schedule, {"photo": 209}, {"photo": {"alt": 1}}),
        sources,
        {64: tuple(range(64))},
        {64: pipeline.RandomCrop(0, 112, (0.4, 1.0), (0.75, 4 / 3), 0.5)},
        14,
    )
    facts = {}

    def finish(batch):
        fact = json.loads(batch.captions[0])
        facts[fact["pid"]] = fact
        del fact["padding"]
        return pipeline.HostBatch(batch.step, batch.arrays, batch.faults)

    def restarted(failure):
        print(failure, flush=True)

    batches = pipeline.BatchIterator(Report(build), range(10**6), finish, workers=2, prefetch=2, on_restart=restarted)
    for _ in range(6):
        next(batches)
    print(json.dumps(list(facts.values())), flush=True)
    if sys.argv[1] == "close":
        kept = next(batches)
        batches.close()
        alive = [pid for pid in facts if os.path.exists(f"/proc/{pid}")]
        print(json.dumps([alive, int(kept.arrays["patches"].sum() > 0)]), flush=True)
    elif sys.argv[1] == "go on":
        sys.stdin.readline()
        print(json.dumps([next(batches).step for _ in range(24)]), flush=True)  # More than are prefetched.
        batches.close()
    elif sys.argv[1] == "hang":
        from types import SimpleNamespace
        from aimv2_jax.resilience.watchdog import Watchdog

        settings = SimpleNamespace(start_s=0, data_s=0, step_s=1, evaluation_s=0, save_s=0, stop_s=0)
        with Watchdog(sys.argv[2], 0, settings) as watchdog, watchdog.watching("step", 6, batches.last_read):
            time.sleep(60)
    elif sys.argv[1] == "forget":
        pass
    else:
        time.sleep(600)


if __name__ == "__main__":
    main()
'''


class Trainer:
    def __init__(self, folder, what):
        path = folder / "trainer.py"
        path.write_text(TRAINER)
        environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[3])}
        environment.pop("JAX_PLATFORMS", None)  # The workers must set it themselves.
        command = [sys.executable, str(path), what, str(folder)]
        self.errors = folder / "errors"
        with self.errors.open("w") as errors:
            self.process = subprocess.Popen(
                command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True
            )
        self.facts = json.loads(self.process.stdout.readline())
        self.workers = [fact["pid"] for fact in self.facts]

    def left(self):
        """Worker processes that still exist."""
        return [pid for pid in self.workers if _runs(pid)]

    def assert_gone_within(self, seconds):
        end = time.monotonic() + seconds
        while left := self.left():
            assert time.monotonic() < end, left
            time.sleep(0.1)


def _runs(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.fixture
def start(tmp_path):
    trainers = []

    def start(what):
        trainers.append(Trainer(tmp_path, what))
        return trainers[-1]

    yield start
    for trainer in trainers:
        trainer.process.kill()
        trainer.process.wait()
        trainer.process.stdin.close(), trainer.process.stdout.close()


def test_workers_when_the_trainer_is_killed(start):
    """They end within 10 s, and no process had memory with a name, which could be left."""
    trainer = start("wait")
    assert len(trainer.workers) == 2 and trainer.left() == trainer.workers
    for pid in (trainer.process.pid, *trainer.workers):
        maps = Path(f"/proc/{pid}/maps").read_text()
        assert "/memfd:aimv2_jax" in maps and "/dev/shm/" not in maps
    trainer.process.kill()
    trainer.assert_gone_within(10)


def test_workers_when_closed_then_gone_at_once_and_batches_in_hand_stay(start):
    trainer = start("close")
    assert json.loads(trainer.process.stdout.readline()) == [[], 1]
    assert trainer.process.wait(20) == 0
    assert [fact["modules"] for fact in trainer.facts] == [[], []]
    assert [fact["backends"] for fact in trainer.facts] == [[], []]
    assert [fact["platforms"] for fact in trainer.facts] == ["cpu", "cpu"]


def test_worker_when_killed_then_named_with_its_record_and_all_goes_on_from_the_batch_that_it_owed(start):
    trainer = start("go on")
    for number in (signal.SIGTERM, signal.SIGINT):  # Some launchers send these to all processes; workers ignore them.
        os.kill(trainer.workers[1], number)
    time.sleep(0.5)
    assert trainer.left() == trainer.workers
    os.kill(trainer.workers[1], signal.SIGKILL)
    trainer.process.stdin.write("\n")
    trainer.process.stdin.flush()
    report = trainer.process.stdout.readline()
    died = (
        rf"data worker [01] of 2 \(process {trainer.workers[1]}\) died with exit code -9 while batch \d+ was awaited; "
    )
    assert re.match(died + r"it (has built step|builds step|reads|has read) ", report), report
    assert json.loads(trainer.process.stdout.readline()) == list(range(6, 30))
    assert trainer.process.wait(30) == 0
    assert report.strip() + "; restarting the workers from that batch" in trainer.errors.read_text()
    trainer.assert_gone_within(10)


def test_trainer_when_it_hangs_then_its_workers_stacks_are_in_the_log_and_nothing_is_left(start, tmp_path):
    trainer = start("hang")
    assert trainer.process.wait(30) == 75
    log = trainer.errors.read_text()
    for pid in trainer.workers:
        stacks = log.split(f"--- stacks of data worker {pid}:\n")[1].split("--- stacks")[0]
        assert "in run_worker" in stacks and "in _exit_with_parent" in stacks
        assert stacks.count("hread 0x") >= 2  # The stacks of all threads.
        assert re.search(rf"\(process {pid}\): (has built step|builds step|reads|has read) ", log)
    [file] = (tmp_path / "hangs").iterdir()
    assert file.name == "00000006-00000-step.txt"
    assert "in main" in file.read_text() and f"(process {trainer.workers[0]})" in file.read_text()
    trainer.assert_gone_within(10)


def test_trainer_when_it_ends_without_closing_then_it_does_end_and_nothing_is_left(start):
    trainer = start("forget")
    assert trainer.process.wait(30) == 0
    trainer.assert_gone_within(10)


STUCK = """
import ctypes, multiprocessing, sys, time
from aimv2_jax.data.loading.workers import start_worker


def stick():
    start_worker()
    print(multiprocessing.current_process().pid, flush=True)
    ctypes.PyDLL(None).sleep(60)  # Holds the GIL.


if __name__ == "__main__":
    multiprocessing.get_context("spawn").Process(target=stick).start()
    time.sleep(60)
"""


def test_worker_when_c_keeps_pythons_lock_then_it_ends_with_its_starter_all_the_same(tmp_path):
    (tmp_path / "stuck.py").write_text(STUCK)
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[3])}
    command = [sys.executable, str(tmp_path / "stuck.py")]
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as process:
        pid = int(process.stdout.readline())
        time.sleep(0.2)
        assert _runs(pid)
        process.kill()
        end = time.monotonic() + 10
        while _runs(pid):
            assert time.monotonic() < end
            time.sleep(0.05)
