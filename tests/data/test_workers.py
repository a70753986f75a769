"""Workers: their imports, and that they and their resources never outlive the trainer."""

import json
import os
import re
import secrets
import signal
import subprocess
import sys
import time
from multiprocessing.shared_memory import SharedMemory
from pathlib import Path

import pytest

from aimv2_jax.data.loading.workers import unlink_shared_memory

# Tests with worker processes run serially: in parallel they would starve the tests that measure time.
pytestmark = pytest.mark.xdist_group("shared-memory")

# A trainer whose shared memory has a unique name prefix, to tell it from that of other programs. Workers import this
# file again, so they use the same prefix.
TRAINER = '''
import dataclasses, json, multiprocessing.shared_memory, os, sys, time

multiprocessing.shared_memory._SHM_NAME_PREFIX = "/t" + os.environ["TRAINER_NAME"]
multiprocessing.current_process()._config["semprefix"] = "/t" + os.environ["TRAINER_NAME"]

from aimv2_jax.data.loading.batch_builder import LocalBatch


@dataclasses.dataclass(frozen=True)
class Report:
    """Builds a batch, and describes its process in the caption."""

    build: object

    def __call__(self, step):
        batch = self.build(step)
        bridge = sys.modules.get("jax._src.xla_bridge")
        facts = {
            "pid": os.getpid(),
            "modules": [m for m in ("tensorflow", "tensorflow_text", "flax") if m in sys.modules],
            "backends": list(bridge._backends) if bridge else [],
            "platforms": sys.modules["jax"].config.jax_platforms,
            "padding": "-" * 100_000,  # More than one atomic pipe write.
        }
        return LocalBatch(step, batch.arrays, [json.dumps(facts).encode()], batch.faults)


def main():
    from aimv2_jax.config import BatchShape
    from aimv2_jax.data import pipeline
    from aimv2_jax.data.loading.tracked_reads import TrackedReads, TrackedSource
    from aimv2_jax.data.loading.read_ahead import ReadAhead

    sources = pipeline.open_sources({"photo": "package:data/sample/train/photo"})
    schedule = pipeline.BatchSchedule(0, [BatchShape(64, 64)])
    build = pipeline.TrainingBatches(
        pipeline.MixtureSampler(0, schedule, {"photo": 209}, {"photo": {"alt": 1}}),
        {name: TrackedSource(source) for name, source in sources.items()},
        {64: tuple(range(64))},
        pipeline.TrainingTransform(0, 112, (0.4, 1.0), (0.75, 4 / 3), 0.5),
        14,
        TrackedReads(ReadAhead()),
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
        names = [name for name in os.listdir("/dev/shm") if name.startswith("t" + os.environ["TRAINER_NAME"])]
        alive = [pid for pid in facts if os.path.exists(f"/proc/{pid}")]
        print(json.dumps([names, alive, int(kept.arrays["patches"].sum() > 0)]), flush=True)
    elif sys.argv[1] == "go on":
        suffix = sys.stdin.readline().strip()
        steps = [next(batches).step for _ in range(24)]  # More than are prefetched.
        names = [name for name in os.listdir("/dev/shm") if name.endswith(suffix)]
        batches.close()
        print(json.dumps([steps, names]), flush=True)
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
        self.name = secrets.token_hex(3)
        environment = os.environ | {"TRAINER_NAME": self.name, "PYTHONPATH": str(Path(__file__).parents[2])}
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
        """Worker processes, shared memory and semaphores that still exist."""
        running = [pid for pid in self.workers if _runs(pid)]
        prefixes = f"t{self.name}", f"sem.t{self.name}"
        return running + [name for name in os.listdir("/dev/shm") if name.startswith(prefixes)]

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


def test_workers_when_the_trainer_is_killed_then_gone_with_their_shared_memory_within_10_s(start):
    trainer = start("wait")
    assert len(trainer.workers) == 2
    left = trainer.left()
    assert set(trainer.workers) < set(left)
    assert {str(name).split("t")[0] for name in left[2:]} == {
        "",
        "sem.",
    }  # Prefetched batches, and semaphores of the queues.
    trainer.process.kill()
    trainer.assert_gone_within(10)


def test_workers_when_closed_then_gone_at_once_and_batches_in_hand_stay(start):
    trainer = start("close")
    assert json.loads(trainer.process.stdout.readline()) == [[], [], 1]
    assert trainer.process.wait(20) == 0
    assert [fact["modules"] for fact in trainer.facts] == [[], []]
    assert [fact["backends"] for fact in trainer.facts] == [[], []]
    assert [fact["platforms"] for fact in trainer.facts] == ["cpu", "cpu"]


def test_worker_when_killed_then_named_with_its_record_and_all_goes_on_from_the_batch_that_it_owed(start):
    trainer = start("go on")
    for number in (signal.SIGTERM, signal.SIGINT):  # Some launchers send these to all processes; workers ignore them.
        os.kill(trainer.workers[1], number)
    time.sleep(0.5)
    before = trainer.left()[2:]
    os.kill(trainer.workers[1], signal.SIGKILL)
    [suffix] = {name.rpartition(".")[2] for name in before if "." in name and not name.startswith("sem.")}
    trainer.process.stdin.write(f".{suffix}\n")
    trainer.process.stdin.flush()
    report = trainer.process.stdout.readline()
    died = (
        rf"data worker [01] of 2 \(process {trainer.workers[1]}\) died with exit code -9 while batch \d+ was awaited; "
    )
    assert re.match(died + r"it (has built step|builds step|reads|has read) ", report), report
    steps, segments = json.loads(trainer.process.stdout.readline())
    assert steps == list(range(6, 30)) and segments == []
    assert trainer.process.wait(30) == 0
    assert report.strip() + "; restarting the workers from that batch" in trainer.errors.read_text()
    trainer.assert_gone_within(10)


def test_trainer_when_it_hangs_then_its_workers_stacks_are_in_the_log_and_nothing_is_left(start, tmp_path):
    trainer = start("hang")
    assert trainer.process.wait(30) == 75
    log = trainer.errors.read_text()
    for pid in trainer.workers:
        stacks = log.split(f"--- stacks of data worker {pid}:\n")[1].split("--- stacks")[0]
        assert "_put_dataset_elements_in_buffer" in stacks and "end-with-trainer" not in stacks
        assert stacks.count("hread 0x") >= 3  # The stacks of all threads.
        assert re.search(rf"\(process {pid}\): (has built step|builds step|reads|has read) ", log)
    [file] = (tmp_path / "hangs").iterdir()
    assert file.name == "00000006-00000-step.txt"
    assert "in main" in file.read_text() and f"(process {trainer.workers[0]})" in file.read_text()
    trainer.assert_gone_within(10)


def test_trainer_when_it_ends_without_closing_then_it_does_end_and_nothing_is_left(start):
    trainer = start("forget")
    assert trainer.process.wait(30) == 0
    trainer.assert_gone_within(10)


KILLED_MAKER = """
import multiprocessing.shared_memory as shared_memory, os, signal
from aimv2_jax.data.loading import workers

workers._track_segments("")
plain = shared_memory._posixshmem.shm_open


def create_then_die(name, *args, **kwargs):
    plain(name, *args, **kwargs)
    print(name.lstrip("/"), flush=True)
    os.kill(os.getpid(), signal.SIGKILL)


shared_memory._posixshmem = type("posixshmem", (), {"shm_open": staticmethod(create_then_die)})
shared_memory.SharedMemory(create=True, size=100)
"""


def test_segment_when_its_maker_is_killed_right_after_making_it_then_it_goes():
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run([sys.executable, "-c", KILLED_MAKER], env=environment, capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    segment = Path("/dev/shm") / done.stdout.strip()
    assert segment.name.startswith("psm_")
    end = time.monotonic() + 10
    while segment.exists():
        assert time.monotonic() < end, segment
        time.sleep(0.05)


STUCK = """
import ctypes, multiprocessing, sys, time
from aimv2_jax.data.loading.workers import start_worker


def stick():
    start_worker(0, 1)
    print(multiprocessing.current_process().pid, flush=True)
    ctypes.PyDLL(None).sleep(60)  # Holds the GIL.


if __name__ == "__main__":
    multiprocessing.get_context("spawn").Process(target=stick).start()
    time.sleep(60)
"""


def test_worker_when_c_keeps_pythons_lock_then_it_ends_with_its_starter_all_the_same(tmp_path):
    (tmp_path / "stuck.py").write_text(STUCK)
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
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


def test_clear_up_when_workers_of_a_desk_have_left_segments_then_those_go_and_no_others():
    token = secrets.token_hex(3)
    left = [SharedMemory(f"psm_{token}.{end}", create=True, size=10) for end in ("abcdef", "abcdee")]
    try:
        unlink_shared_memory("psm_abcdef")
        assert [os.path.exists(f"/dev/shm/{segment.name}") for segment in left] == [False, True]
    finally:
        left[1].unlink()
        for segment in left:
            segment.close()
