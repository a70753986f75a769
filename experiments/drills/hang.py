"""Lets things hang, die and pile up: what does the log say, what is left, and are the batches the same?

    python experiments/drills/hang.py [--long] [--trainer] [--json hang.json]

1. Stalls of 3 s (--long: 30 s), three times the time-out: in a data worker, in a step, in a save. Within twice the
   time-out the stacks of all threads must be in the log, and the process must end with 75; with 4 when it is started
   again and hangs at the same step. A worker that stalls only once must cost nothing.
2. Workers killed (SIGKILL) at random moments: example numbers and pixels must be those of a run in threads.
3. Starts and stops of the workers: no process and no shared memory may be left.
4. Memory of the trainer and of each worker: after a warm-up it may grow by less than 1 MiB over 1,000 batches.

Step and save hang in a small program with the trainer's watchdog; with --trainer, in a small run of the trainer itself.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import random
import secrets
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from aimv2_jax.data.sources import Source  # noqa: E402
from aimv2_jax.errors import EXIT_AGAIN, EXIT_FINISHED, reports_user_errors  # noqa: E402
from aimv2_jax.flags import Parser, check_output  # noqa: E402
from aimv2_jax.platforms import skip_absent_tpu  # noqa: E402
from aimv2_jax.train.watchdog import EXIT_HUNG, Watchdog, register_dump_signal  # noqa: E402
from experiments.drills import kill  # noqa: E402 (it names the shared memory of this process and its workers)

# This file is the program that hangs, too, and its workers import it again: what it does there is in the environment.
_JOB = json.loads(os.environ.get("DRILL_HANG", "{}"))
_HUNG_STEP = 30
_MIB = 1 << 20
_MOST_GROWTH_MIB = 1.0
_AGAIN_S = 2.0
_ENDS_S = 30.0  # In which a process that hangs must have ended, when its stacks are in the log.


# --- the programs that are started ------------------------------------------------------------------------------------


def stall() -> None:
    """Says so, and sleeps, as what waits for a disk or a device does: in C, and no signal ends it."""
    print(f"stalls {time.monotonic()}", file=sys.stderr, flush=True)
    time.sleep(_JOB["stall_s"])


def stall_in_worker() -> None:
    """Lets the read of one record stall: at every start, or once."""
    read = Source.read

    def stalled(self: Source, index: int) -> bytes:
        if [self.name, index] == _JOB["record"] and not os.path.exists(_JOB["once"]):
            if _JOB["job"] == "worker once":
                Path(_JOB["once"]).touch()
            stall()
        return read(self, index)

    Source.read = stalled


if _JOB.get("job", "").startswith("worker"):
    stall_in_worker()


def config(workers: int) -> Any:
    from aimv2_jax.config import load_config

    return load_config(kill.QUICKSTART, [(k, str(v)) for k, v in (kill.SETTINGS | {"data.workers": workers}).items()])


def late_record() -> tuple[str, int]:
    """Source and number of a record that is read first for batch 4: the workers have long begun."""
    from aimv2_jax.data.pipeline import open_sources, training_plan

    settings = config(2)
    plan, size = training_plan(settings, open_sources(settings.data.sources)), settings.data.batch_size
    draws = [plan.draw(example) for example in range(5 * size)]
    read = [(draw.source, next(plan.records(draw))) for draw in draws]
    return next(record for record in read[4 * size :] if record not in read[: 4 * size])


def watchdog(**limits: float) -> Watchdog:
    never = {f"{what}_s": 0.0 for what in ("start", "data", "step", "evaluation", "save")}
    return Watchdog(_JOB["workdir"], 0, SimpleNamespace(**never | limits))


def hang_in_worker() -> None:
    from aimv2_jax.data.pipeline import training_batches

    timeout_s = _JOB["timeout_s"]
    with (
        watchdog(data_s=timeout_s) as dog,
        training_batches(config(2), range, 0, stall_s=timeout_s / 2) as batches,
    ):
        print("ready", file=sys.stderr, flush=True)
        for step in range(_HUNG_STEP):
            if step == 0:  # The workers' imports take as long as they take.
                next(batches)
                continue
            # The worker may have stalled long ago, while there still were batches.
            since_s = time.monotonic()
            with dog.watching("data", 0, batches.last_read):
                next(batches)
            if time.monotonic() - since_s > timeout_s / 2:
                print("waited", file=sys.stderr, flush=True)


def hang_in(what: str) -> None:
    with watchdog(**{f"{what}_s": _JOB["timeout_s"]}) as dog:
        for step in range(_HUNG_STEP):
            with dog.watching(what, step):
                stall() if step == 20 else time.sleep(0.01)


def hang_in_trainer(what: str) -> int:
    """The trainer, in which the numbers of a step, or a save, don't come."""
    import jax

    from aimv2_jax.main import main as trainer_main
    from aimv2_jax.train import loop

    if what == "save":
        save = loop.Checkpointer.save

        def stalled_save(self: Any, *args: Any, **kwargs: Any) -> Any:
            stall()
            return save(self, *args, **kwargs)

        loop.Checkpointer.save = stalled_save
    if what == "step":
        device_get, count = jax.device_get, iter(range(10**6))

        def stalled_get(tree: Any) -> Any:
            if isinstance(tree, dict) and "grad_norm" in tree and next(count) == 10:
                stall()
            return device_get(tree)

        jax.device_get = stalled_get
    keys = [f"--config.{key}={value}" for key, value in kill.SETTINGS.items()]
    limit = f"--config.watch.{'data' if what.startswith('worker') else what}_s={_JOB['timeout_s']:.0f}"
    arguments = [
        f"--config={kill.QUICKSTART}",
        f"--workdir={_JOB['workdir']}",
        "--config.train.steps=100",
        *keys,
        limit,
    ]
    return trainer_main(arguments)


def digests() -> None:
    """Takes batches, kills workers meanwhile, and says what was in each batch."""
    from aimv2_jax.data.pipeline import training_batches
    from aimv2_jax.data.workers import reading

    moments, failures = random.Random(_JOB["seed"]), []
    kills = set(moments.sample(range(5, _JOB["batches"] - 20), _JOB["kills"]))
    found = []
    with training_batches(config(_JOB["workers"]), range, 0, on_restart=failures.append) as batches:
        for number in range(_JOB["batches"]):
            batch = next(batches)
            arrays = b"".join(array.tobytes() for _, array in sorted(batch.arrays.items()))
            found.append((batch.step, batch.arrays["example_index"].tolist(), hashlib.sha256(arrays).hexdigest()))
            if number in kills and reading():
                os.kill(moments.choice(reading()), signal.SIGKILL)
    print(json.dumps({"batches": found, "restarts": [str(failure) for failure in failures]}), flush=True)


def start_and_stop() -> None:
    import multiprocessing

    from aimv2_jax.data.pipeline import training_batches

    left = []
    for _ in range(_JOB["starts"]):
        with training_batches(config(2), range, 0) as batches:
            next(batches), next(batches)
        segments = [name for name in os.listdir("/dev/shm") if name.startswith(kill._NAME)]
        left.append((len(multiprocessing.active_children()), len(segments)))
    print(json.dumps(left), flush=True)


def measure_memory() -> None:
    """Says what the trainer and each worker hold, in MiB, after every tenth batch."""
    from aimv2_jax.data.pipeline import training_batches
    from aimv2_jax.data.workers import reading

    found: dict[str, list[float]] = {}
    with training_batches(config(2), range, 0) as batches:
        for number in range(_JOB["warm_up"] + _JOB["batches"]):
            next(batches)
            if number >= _JOB["warm_up"] and number % 10 == 0:
                pids = {"trainer": os.getpid()} | {f"worker {i}": pid for i, pid in enumerate(reading())}
                for name, pid in pids.items():
                    found.setdefault(name, []).append(anonymous_mib(pid))
    print(json.dumps(found), flush=True)


def anonymous_mib(pid: int) -> float:
    """Memory of a process' own; what it shares for batches comes and goes."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("RssAnon"):
            return int(line.split()[1]) / 1024
    raise AssertionError(f"no RssAnon of {pid}")


# --- starting them, and looking ---------------------------------------------------------------------------------------


class Child(kill.Trainer):
    """This file, in a process of its own, doing a job; its processes and shared memory can be told from others'."""

    def __init__(self, folder: Path, **job: Any):
        self.name = f"k{secrets.token_hex(3)}"
        self.file = folder / f"{self.name}.log"
        self._log = self.file.open("a+")
        environment = os.environ | {"DRILL_NAME": self.name, "DRILL_HANG": json.dumps(job)}
        self.process = subprocess.Popen(
            [sys.executable, __file__], env=environment, stdout=subprocess.PIPE, stderr=self._log, text=True
        )

    def result(self) -> Any:
        """What it said at its end, as JSON, after which nothing of it may be left."""
        out, _ = self.process.communicate()
        if self.process.returncode != EXIT_FINISHED:
            raise RuntimeError(f"it ended with code {self.process.returncode}:\n{self.said()}")
        self.wait_until_gone()
        return json.loads(out.splitlines()[-1])


@dataclasses.dataclass(frozen=True)
class Hung:
    """Where it hung, the time-out, when stacks were in the log and it had ended, after the stall began; exit codes."""

    what: str
    timeout_s: float
    stacks_s: float
    end_s: float
    codes: tuple[int, int]
    threads: int


def hang(folder: Path, what: str, stall_s: float, timeout_s: float, trainer: bool) -> Hung:
    """Lets it hang twice, at the same step; raises RuntimeError where the log or the codes are not as they should."""
    codes, stacks_s, end_s, threads = [], 0.0, 0.0, 0
    workdir = folder / what
    name, index = late_record()
    job = dict(job=what, stall_s=stall_s, timeout_s=timeout_s, workdir=str(workdir), trainer=trainer)
    job |= dict(record=[name, index], once="/nonexistent")
    for _ in range(2):
        with Child(folder, **job) as child:
            # A worker stalls while there still are batches: what counts is the wait for the one it owes.
            begin_s = when(child, lambda text: "stalls " in text)
            found_s = when(child, lambda text: "hung: " in text and "is MainThread\n" in text)
            code = child.process.wait(_ENDS_S)
            end_s, stacks_s = max(end_s, time.monotonic() - begin_s), max(stacks_s, found_s - begin_s)
            child.wait_until_gone()
            text = child.file.read_text()
            codes.append(code)
            threads = text.count("hread 0x")
            if what == "worker" and (
                "stacks of data worker" not in text or f"reads record {index} of {name}" not in text
            ):
                raise RuntimeError(f"the log says nothing of the worker:\n{text[-3000:]}")
    if codes != [EXIT_AGAIN, EXIT_HUNG]:
        raise RuntimeError(f"{what}: ended with codes {codes}")
    # Batches that were ready are taken first, and the worker is started again: that is no part of the wait.
    if stacks_s > 2 * timeout_s + (_AGAIN_S if what == "worker" else 0):
        raise RuntimeError(f"{what}: stacks after {stacks_s:.1f} s, with a time-out of {timeout_s} s")
    return Hung(what, timeout_s, round(stacks_s, 2), round(end_s, 2), (codes[0], codes[1]), threads)


def when(child: Child, said: Callable[[str], bool]) -> float:
    """The moment at which the log says so."""
    deadline_s = time.monotonic() + 180
    while not said(child.file.read_text()):
        if time.monotonic() > deadline_s or (child.process.poll() is not None and not said(child.file.read_text())):
            raise RuntimeError(f"the log does not say what it should; code {child.process.poll()}:\n{child.said()}")
        time.sleep(0.02)
    return time.monotonic()


def drill_hangs(folder: Path, long: bool, trainer: bool) -> list[Hung]:
    stall_s, timeout_s = (30.0, 10.0) if long else (3.0, 1.0)
    hangs = []
    for what in ("worker", "step", "save"):
        # The trainer's worker must come back after a first stall, or the run would not be what hangs.
        hangs.append(hang(folder, what, 10 * stall_s if what == "worker" else stall_s, timeout_s, trainer))
        print(hangs[-1], flush=True)
    job = dict(job="worker once", stall_s=600, timeout_s=30, workdir=str(folder / "w"), once=str(folder / "once"))
    with Child(folder, record=late_record(), **job) as child:
        code = child.process.wait()
        child.wait_until_gone()
        text = child.file.read_text()
        if code != EXIT_FINISHED or "has stalled for " not in text:
            raise RuntimeError(f"a worker that stalled once ended the run, with code {code}:\n{child.said()}")
    print("a worker that stalled once was started again, and the run went on", flush=True)
    return hangs


def drill_kills(folder: Path, kills: int) -> dict[str, Any]:
    batches = 60 + 40 * kills
    with Child(folder, job="digests", workers=2, kills=kills, batches=batches, seed=1) as child:
        killed = child.result()
    with Child(folder, job="digests", workers=0, kills=0, batches=batches, seed=1) as child:
        straight = child.result()
    if killed["batches"] != straight["batches"]:
        raise RuntimeError("the batches of the run whose workers were killed are others")
    restarts = killed["restarts"]
    if not kills / 2 <= len(restarts) <= kills:  # Two may be killed before the first is missed.
        raise RuntimeError(f"{kills} kills, and {len(restarts)} restarts")
    report = {"kills": kills, "restarts": len(restarts), "batches": batches, "example": restarts[0]}
    print(f"{kills} workers killed: {batches} batches are those of the run in threads; {restarts[0]}", flush=True)
    return report


def drill_starts(folder: Path, starts: int) -> dict[str, Any]:
    with Child(folder, job="starts", starts=starts) as child:
        left = child.result()
    if left != [[0, 0]] * starts:
        raise RuntimeError(f"children and segments that were left: {left}")
    print(f"{starts} starts and stops left 0 children and 0 files of shared memory", flush=True)
    return {"starts": starts, "children": 0, "segments": 0}


def drill_memory(folder: Path, batches: int) -> dict[str, float]:
    with Child(folder, job="memory", batches=batches, warm_up=batches // 2) as child:
        found = child.result()
    tenth = max(1, batches // 100)
    growth = {
        name: round(statistics.median(mib[-tenth:]) - statistics.median(mib[:tenth]), 3) for name, mib in found.items()
    }
    print(f"memory over {batches} batches, MiB: {growth}", flush=True)
    if len(growth) != 3 or max(growth.values()) >= _MOST_GROWTH_MIB:
        raise RuntimeError(f"memory grows: {growth}; {found}")
    return growth


def work() -> int:
    """What a child does."""
    register_dump_signal()
    job = _JOB["job"]
    if job in ("step", "save", "worker", "worker once"):
        if _JOB.get("trainer"):
            return hang_in_trainer(job)
        hang_in_worker() if job.startswith("worker") else hang_in(job)
    else:
        {"digests": digests, "starts": start_and_stop, "memory": measure_memory}[job]()
    return EXIT_FINISHED


@reports_user_errors
def main(arguments: Sequence[str] | None = None) -> int:
    skip_absent_tpu()
    parser = Parser(prog="python experiments/drills/hang.py", description="Lets things hang, die and pile up.")
    parser.add_argument("--long", action="store_true", help="the long form: some ten minutes")
    parser.add_argument("--trainer", action="store_true", help="the trainer itself is what hangs")
    parser.add_argument("--json", type=Path, metavar="FILE", help="where the report goes")
    flags = parser.parse_args(arguments)
    if flags.json:
        check_output(flags.json, flag="--json")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(kill.EXIT_TERMINATED))  # So that no child is left behind.
    with tempfile.TemporaryDirectory(prefix="drill-") as folder:
        path = Path(folder)
        report = {
            "hangs": [dataclasses.asdict(one) for one in drill_hangs(path, flags.long, flags.trainer)],
            "kills": drill_kills(path, 10 if flags.long else 2),
            "starts": drill_starts(path, 20 if flags.long else 3),
            "memory_mib": drill_memory(path, 1000 if flags.long else 300),
        }
    if flags.json:
        flags.json.write_text(json.dumps(report, indent=1) + "\n")
    return EXIT_FINISHED


if __name__ == "__main__":
    sys.exit(work() if _JOB else main())
