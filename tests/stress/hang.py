"""Drill for hangs, killed workers and leaks: checks the log, the remaining resources and the batches.

    python tests/stress/hang.py [--long] [--json hang.json]

1. A small run of the trainer stalls for 6 s (--long: 30 s), three times the timeout: in a data worker, in a step, in a
   save, and in the save after a stop request. Within twice the timeout the stacks of all threads must be in the log,
   and the process must exit with 75, or with 4 if the next start hangs at the same step. A worker that stalls only once
   must not end the run.
2. Workers are killed (SIGKILL) at random moments: example numbers and pixels must equal those of a run in threads.
3. Workers start and stop repeatedly: no process and no file in memory may remain.
4. Memory of the trainer and of each worker may grow by less than 1 MiB over 1,000 batches after a warm-up.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import multiprocessing
import os
import random
import re
import secrets
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from aimv2_jax.cli import Parser, check_output  # noqa: E402
from aimv2_jax.data.sources import Source  # noqa: E402
from aimv2_jax.errors import EXIT_FINISHED, EXIT_RETRY, cli_main  # noqa: E402
from aimv2_jax.platforms import skip_absent_tpu  # noqa: E402
from aimv2_jax.resilience.watchdog import EXIT_HUNG, register_dump_signal  # noqa: E402
from tests.helpers.bytes_tokenizer import replace_tokenizer  # noqa: E402
from tests.stress.trainer import EXIT_TERMINATED, TIMEOUT_S, Child, small_config, trainer_flags  # noqa: E402

# The hanging subprocess also runs this file, and its workers import it again; its job is in the environment.
_JOB = json.loads(os.environ.get("DRILL_HANG", "{}"))
_LATE_BATCH = 18  # Before the first save, so that a second start reaches it after the same number of steps.
_MIB = 1 << 20
_MAX_GROWTH_MIB = 1.0
_WORKER_RESTART_S = 2.0  # Allowance for the restart of a worker.
_EXIT_TIMEOUT_S = 30.0  # For a hung process to exit, after its stacks are in the log.


# --- subprocesses -----------------------------------------------------------------------------------------------------


def stall() -> None:
    """Logs the stall and sleeps in C, like a wait for a disk or a device, which no signal ends."""
    print(f"stalls {time.monotonic()}", file=sys.stderr, flush=True)
    time.sleep(_JOB["stall_s"])


def stall_in_worker() -> None:
    """Makes a worker's read of one record stall, at every start or once. Reads by the trainer do not stall."""
    read = Source.read

    def stalled(self: Source, index: int) -> bytes:
        in_worker = multiprocessing.parent_process() is not None
        if in_worker and [self.name, index] == _JOB["record"] and not os.path.exists(_JOB["once"]):
            if _JOB["job"] == "worker once":
                Path(_JOB["once"]).touch()
            stall()
        return read(self, index)

    Source.read = stalled


if _JOB.get("job", "").startswith("worker"):
    stall_in_worker()


def late_record() -> tuple[str, int]:
    """Returns source and index of a record that workers first read for a batch they begin during training."""
    from aimv2_jax.data.pipeline import open_sources, training_sampler

    settings = small_config()
    sampler, size = training_sampler(settings, open_sources(settings).training), settings.data.batch_size
    draws = [sampler.draw(example) for example in range((_LATE_BATCH + 1) * size)]
    read = [(draw.source, next(sampler.records(draw))) for draw in draws]
    return next(record for record in read[_LATE_BATCH * size :] if record not in read[: _LATE_BATCH * size])


def hang(what: str) -> int:
    """Runs the trainer with a stall in a step, in a save, or in the save after a stop request."""
    import jax

    from aimv2_jax.main import main as trainer_main
    from aimv2_jax.train import trainer

    if what in ("save", "stop"):
        save = trainer.Checkpointer.save

        def stalled_save(self: Any, *args: Any, **kwargs: Any) -> Any:
            stall()
            return save(self, *args, **kwargs)

        trainer.Checkpointer.save = stalled_save
    if what in ("step", "stop"):
        device_get, count = jax.device_get, iter(range(10**6))

        def stalled_get(tree: Any) -> Any:
            if isinstance(tree, dict) and "grad_norm" in tree and next(count) == 10:
                stall() if what == "step" else signal.raise_signal(signal.SIGTERM)
            return device_get(tree)

        jax.device_get = stalled_get
    replace_tokenizer()
    changes = {f"watch__{'data' if what.startswith('worker') else what}_s": f"{_JOB['timeout_s']:.0f}"}
    if jax.config.jax_compilation_cache_dir:  # With a cache, no timed start compiles.
        changes["train__compilation_cache"] = "workdir"
    return trainer_main(trainer_flags(Path(_JOB["workdir"]), train__steps=100, **changes))


def digests() -> None:
    """Reads batches while killing workers, and prints a digest of each batch."""
    from aimv2_jax.data.loading.workers import live_worker_pids
    from aimv2_jax.data.pipeline import training_batches

    moments = random.Random(_JOB["seed"])
    failures = []
    kills = set(moments.sample(range(5, _JOB["batches"] - 20), _JOB["kills"]))
    batch_digests = []
    with training_batches(small_config(data__workers=_JOB["workers"]), range, 0, on_restart=failures.append) as batches:
        for number in range(_JOB["batches"]):
            batch = next(batches)
            arrays = b"".join(array.tobytes() for _, array in sorted(batch.arrays.items()))
            batch_digests.append(
                (batch.step, batch.arrays["example_index"].tolist(), hashlib.sha256(arrays).hexdigest())
            )
            if number in kills and live_worker_pids():
                os.kill(moments.choice(live_worker_pids()), signal.SIGKILL)
    print(json.dumps({"batches": batch_digests, "restarts": [str(failure) for failure in failures]}), flush=True)


def start_and_stop() -> None:
    import multiprocessing

    from aimv2_jax.data.pipeline import training_batches

    left = []
    for _ in range(_JOB["starts"]):
        with training_batches(small_config(), range, 0) as batches:
            next(batches), next(batches)
        del batches
        files = Path("/proc/self/maps").read_text().count("memfd:aimv2_jax")
        left.append((len(multiprocessing.active_children()), files))
    print(json.dumps(left), flush=True)


def measure_memory() -> None:
    """Prints the memory of the trainer and of each worker, in MiB, after every tenth batch."""
    from aimv2_jax.data.loading.workers import live_worker_pids
    from aimv2_jax.data.pipeline import training_batches

    mib_by_process: dict[str, list[float]] = {}
    with training_batches(small_config(), range, 0) as batches:
        for number in range(_JOB["warm_up"] + _JOB["batches"]):
            next(batches)
            if number >= _JOB["warm_up"] and number % 10 == 0:
                pids = {"trainer": os.getpid()} | {f"worker {i}": pid for i, pid in enumerate(live_worker_pids())}
                for name, pid in pids.items():
                    mib_by_process.setdefault(name, []).append(anonymous_mib(pid))
    print(json.dumps(mib_by_process), flush=True)


def anonymous_mib(pid: int) -> float:
    """Returns the private memory of a process; its shared memory for batches varies."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("RssAnon"):
            return int(line.split()[1]) / 1024
    raise AssertionError(f"no RssAnon of {pid}")


_RESULT_JOBS = {"digests": digests, "starts": start_and_stop, "memory": measure_memory}  # Jobs that print a result.


# --- checks -----------------------------------------------------------------------------------------------------------


class Job(Child):
    """This file in a subprocess, running a job."""

    def __init__(self, folder: Path, **job: Any):
        self.file = folder / f"{secrets.token_hex(4)}.log"
        pipe = subprocess.PIPE if job["job"] in _RESULT_JOBS else None
        super().__init__([__file__], self.file, {"DRILL_HANG": json.dumps(job)}, output=pipe)

    def result(self) -> Any:
        """Returns the JSON result that the job printed, after all its resources are gone."""
        out, _ = self.process.communicate(timeout=TIMEOUT_S)
        if self.process.returncode != EXIT_FINISHED:
            raise RuntimeError(f"the process ended with code {self.process.returncode}:\n{self.log_tail()}")
        self.wait_until_gone()
        return json.loads(out.splitlines()[-1])


@dataclasses.dataclass(frozen=True)
class Hung:
    """Measured hang: seconds from the stall to the stacks in the log and to the exit; exit codes; number of threads."""

    what: str
    timeout_s: float
    stacks_s: float
    end_s: float
    codes: tuple[int, ...]
    threads: int


def hang_at_one_step(folder: Path, what: str, stall_s: float, timeout_s: float, starts: int = 2) -> Hung:
    """Makes every start hang at the same step; raises RuntimeError if the log or the exit codes are wrong."""
    codes, stacks_s, end_s, threads = [], 0.0, 0.0, 0
    workdir = folder / what
    name, index = late_record()
    job = dict(job=what, stall_s=stall_s, timeout_s=timeout_s, workdir=str(workdir))
    job |= dict(record=[name, index], once="/nonexistent")
    for _ in range(starts):
        with Job(folder, **job) as child:
            # A worker stalls while batches are still queued; the wait for its own batch counts.
            begin_s = when(child, lambda text: "stalls " in text)
            stacks_logged_s = when(child, lambda text: "hung: " in text and "is MainThread\n" in text)
            code = child.process.wait(_EXIT_TIMEOUT_S)
            end_s, stacks_s = max(end_s, time.monotonic() - begin_s), max(stacks_s, stacks_logged_s - begin_s)
            child.wait_until_gone()
            text = child.file.read_text()
            codes.append(code)
            threads = len(re.findall(r"^thread 0x\S+ is ", text, re.MULTILINE))
            if what == "worker" and (
                "stacks of data worker" not in text or f"reads record {index} of {name}" not in text
            ):
                raise RuntimeError(f"the log does not name the worker:\n{text[-3000:]}")
    if codes != [EXIT_RETRY, EXIT_HUNG][:starts]:
        raise RuntimeError(f"{what}: the exit codes are {codes}")
    # Queued batches are consumed first, and the worker is restarted; neither is part of the wait.
    if stacks_s > 2 * timeout_s + (_WORKER_RESTART_S if what == "worker" else 0):
        raise RuntimeError(f"{what}: stacks after {stacks_s:.1f} s, with a timeout of {timeout_s} s")
    return Hung(what, timeout_s, round(stacks_s, 2), round(end_s, 2), tuple(codes), threads)


def when(child: Job, condition: Callable[[str], bool]) -> float:
    """Waits until the log satisfies a condition and returns the time."""
    deadline_s = time.monotonic() + 180
    while not condition(child.file.read_text()):
        ended = child.process.poll() is not None
        if time.monotonic() > deadline_s or (ended and not condition(child.file.read_text())):
            raise RuntimeError(
                f"an expected line is missing in the log; code {child.process.poll()}:\n{child.log_tail()}"
            )
        time.sleep(0.02)
    return time.monotonic()


def drill_hangs(folder: Path, long: bool) -> list[Hung]:
    stall_s, timeout_s = (30.0, 10.0) if long else (6.0, 2.0)
    hangs = []
    for what in ("worker", "step", "save", "stop"):
        # A worker must restart after its first stall, in time, so that the run hangs at the second.
        in_worker = what == "worker"
        hangs.append(hang_at_one_step(folder, what, 300.0 if in_worker else stall_s, 10.0 if in_worker else timeout_s))
        print(hangs[-1], flush=True)
    stall_once(folder, 30.0)
    print("a worker that stalled once was restarted, and the run continued", flush=True)
    return hangs


def stall_once(folder: Path, timeout_s: float) -> None:
    """Raises RuntimeError unless a run finishes although a worker stalls beyond its timeout at its first start."""
    job = dict(job="worker once", stall_s=20 * timeout_s, timeout_s=timeout_s, once=str(folder / "once"))
    with Job(folder, record=late_record(), workdir=str(folder / "stalled"), **job) as child:
        code = child.process.wait(TIMEOUT_S)
        child.wait_until_gone()
        if code != EXIT_FINISHED or "has stalled for " not in child.file.read_text():
            raise RuntimeError(f"a worker that stalled once ended the run, with code {code}:\n{child.log_tail()}")


def drill_kills(folder: Path, kills: int) -> dict[str, Any]:
    batches = 60 + 40 * kills
    with Job(folder, job="digests", workers=2, kills=kills, batches=batches, seed=1) as child:
        killed = child.result()
    with Job(folder, job="digests", workers=0, kills=0, batches=batches, seed=1) as child:
        straight = child.result()
    if killed["batches"] != straight["batches"]:
        raise RuntimeError("the run with killed workers has different batches")
    restarts = killed["restarts"]
    if not kills / 2 <= len(restarts) <= kills:  # Two may be killed before the first death is noticed.
        raise RuntimeError(f"{kills} kills, but {len(restarts)} restarts")
    report = {"kills": kills, "restarts": len(restarts), "batches": batches, "example": restarts[0]}
    print(f"{kills} workers killed: {batches} batches equal those of the run in threads; {restarts[0]}", flush=True)
    return report


def drill_starts(folder: Path, starts: int) -> dict[str, Any]:
    with Job(folder, job="starts", starts=starts) as child:
        left = child.result()
    if left != [[0, 0]] * starts:
        raise RuntimeError(f"remaining children and files: {left}")
    print(f"{starts} starts and stops left 0 children and 0 files in memory", flush=True)
    return {"starts": starts, "children": 0, "files": 0}


def drill_memory(folder: Path, batches: int) -> dict[str, float]:
    with Job(folder, job="memory", batches=batches, warm_up=batches // 2) as child:
        mib_by_process = child.result()
    tenth = max(1, batches // 100)
    growth = {
        name: round(statistics.median(mib[-tenth:]) - statistics.median(mib[:tenth]), 3)
        for name, mib in mib_by_process.items()
    }
    print(f"memory over {batches} batches, MiB: {growth}", flush=True)
    if len(growth) != 3 or max(growth.values()) >= _MAX_GROWTH_MIB:
        raise RuntimeError(f"memory grows: {growth}; {mib_by_process}")
    return growth


def work() -> int:
    """Runs the job of a subprocess."""
    register_dump_signal()
    job = _JOB["job"]
    if job not in _RESULT_JOBS:
        return hang(job)
    _RESULT_JOBS[job]()
    return EXIT_FINISHED


@cli_main
def main(arguments: Sequence[str] | None = None) -> int:
    skip_absent_tpu()
    parser = Parser(prog="python tests/stress/hang.py", description="Drill for hangs, killed workers and leaks.")
    parser.add_argument("--long", action="store_true", help="run the long form, about ten minutes")
    parser.add_argument("--json", type=Path, metavar="FILE", help="where the report goes")
    flags = parser.parse_args(arguments)
    if flags.json:
        check_output(flags.json, flag="--json")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(EXIT_TERMINATED))  # Stops the children too.
    with tempfile.TemporaryDirectory(prefix="drill-") as folder:
        path = Path(folder)
        report = {
            "hangs": [dataclasses.asdict(hung) for hung in drill_hangs(path, flags.long)],
            "kills": drill_kills(path, 10 if flags.long else 2),
            "starts": drill_starts(path, 20 if flags.long else 3),
            "memory_mib": drill_memory(path, 1000 if flags.long else 300),
        }
    if flags.json:
        flags.json.write_text(json.dumps(report, indent=1) + "\n")
    return EXIT_FINISHED


if __name__ == "__main__":
    sys.exit(work() if _JOB else main())
