"""Lets things hang, die and pile up: what does the log say, what is left, and are the batches the same?

    python experiments/drills/hang.py [--long] [--json hang.json]

1. A small run of the trainer stalls for 6 s (--long: 30 s), three times the time-out: in a data worker, in a step, in a
   save, in the save of a run that was asked to stop. Within twice the time-out the stacks of all threads must be in the
   log, and the process must end with 75; with 4 when it is started again and hangs at the same step. A worker that
   stalls only once must cost nothing.
2. Workers killed (SIGKILL) at random moments: example numbers and pixels must be those of a run in threads.
3. Starts and stops of the workers: no process and no shared memory may be left.
4. Memory of the trainer and of each worker: after a warm-up it may grow by less than 1 MiB over 1,000 batches.
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

from aimv2_jax.data.sources import Source  # noqa: E402
from aimv2_jax.errors import EXIT_AGAIN, EXIT_FINISHED, reports_user_errors  # noqa: E402
from aimv2_jax.flags import Parser, check_output  # noqa: E402
from aimv2_jax.platforms import skip_absent_tpu  # noqa: E402
from aimv2_jax.train.watchdog import EXIT_HUNG, register_dump_signal  # noqa: E402
from experiments.drills.bytes_tokenizer import replace_tokenizer  # noqa: E402
from experiments.drills.trainer import ENDS_S, EXIT_TERMINATED, NAME, Child, small_config, trainer_flags  # noqa: E402

# This file is the program that hangs, too, and its workers import it again: what it does there is in the environment.
_JOB = json.loads(os.environ.get("DRILL_HANG", "{}"))
_LATE_BATCH = 18  # Before the first save, so that a second start meets it after as many steps.
_MIB = 1 << 20
_MOST_GROWTH_MIB = 1.0
_AGAIN_S = 2.0  # In which a worker is started again.
_ENDS_S = 30.0  # In which a process that hangs must have ended, when its stacks are in the log.


# --- the programs that are started ------------------------------------------------------------------------------------


def stall() -> None:
    """Says so, and sleeps, as what waits for a disk or a device does: in C, and no signal ends it."""
    print(f"stalls {time.monotonic()}", file=sys.stderr, flush=True)
    time.sleep(_JOB["stall_s"])


def stall_in_worker() -> None:
    """Lets a worker's read of one record stall: at every start, or once. The trainer may read it at its start."""
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
    """Source and number of a record that is read first for a batch that workers begin when steps are going on."""
    from aimv2_jax.data.pipeline import open_sources, training_plan

    settings = small_config()
    plan, size = training_plan(settings, open_sources(settings.data.sources)), settings.data.batch_size
    draws = [plan.draw(example) for example in range((_LATE_BATCH + 1) * size)]
    read = [(draw.source, next(plan.records(draw))) for draw in draws]
    return next(record for record in read[_LATE_BATCH * size :] if record not in read[: _LATE_BATCH * size])


def hang(what: str) -> int:
    """The trainer, in which the numbers of a step, or a save, or that of a run that is asked to stop, don't come."""
    import jax

    from aimv2_jax.main import main as trainer_main
    from aimv2_jax.train import loop

    if what in ("save", "stop"):
        save = loop.Checkpointer.save

        def stalled_save(self: Any, *args: Any, **kwargs: Any) -> Any:
            stall()
            return save(self, *args, **kwargs)

        loop.Checkpointer.save = stalled_save
    if what in ("step", "stop"):
        device_get, count = jax.device_get, iter(range(10**6))

        def stalled_get(tree: Any) -> Any:
            if isinstance(tree, dict) and "grad_norm" in tree and next(count) == 10:
                stall() if what == "step" else signal.raise_signal(signal.SIGTERM)
            return device_get(tree)

        jax.device_get = stalled_get
    replace_tokenizer()
    changes = {f"watch__{'data' if what.startswith('worker') else what}_s": f"{_JOB['timeout_s']:.0f}"}
    if jax.config.jax_compilation_cache_dir:  # Nothing that hangs does so while it compiles.
        changes["train__compilation_cache"] = "workdir"
    return trainer_main(trainer_flags(Path(_JOB["workdir"]), train__steps=100, **changes))


def digests() -> None:
    """Takes batches, kills workers meanwhile, and says what was in each batch."""
    from aimv2_jax.data.pipeline import training_batches
    from aimv2_jax.data.workers import reading

    moments, failures = random.Random(_JOB["seed"]), []
    kills = set(moments.sample(range(5, _JOB["batches"] - 20), _JOB["kills"]))
    found = []
    with training_batches(small_config(data__workers=_JOB["workers"]), range, 0, on_restart=failures.append) as batches:
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
        with training_batches(small_config(), range, 0) as batches:
            next(batches), next(batches)
        segments = [name for name in os.listdir("/dev/shm") if name.startswith(NAME)]
        left.append((len(multiprocessing.active_children()), len(segments)))
    print(json.dumps(left), flush=True)


def measure_memory() -> None:
    """Says what the trainer and each worker hold, in MiB, after every tenth batch."""
    from aimv2_jax.data.pipeline import training_batches
    from aimv2_jax.data.workers import reading

    found: dict[str, list[float]] = {}
    with training_batches(small_config(), range, 0) as batches:
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


_TELLING = {"digests": digests, "starts": start_and_stop, "memory": measure_memory}  # Jobs that print what they found.


# --- starting them, and looking ---------------------------------------------------------------------------------------


class Job(Child):
    """This file, in a process of its own, doing a job."""

    def __init__(self, folder: Path, **job: Any):
        self.file = folder / f"{secrets.token_hex(4)}.log"
        pipe = subprocess.PIPE if job["job"] in _TELLING else None
        super().__init__([__file__], self.file, {"DRILL_HANG": json.dumps(job)}, output=pipe)

    def result(self) -> Any:
        """What it said at its end, as JSON, after which nothing of it may be left."""
        out, _ = self.process.communicate(timeout=ENDS_S)
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
    codes: tuple[int, ...]
    threads: int


def hang_at_one_step(folder: Path, what: str, stall_s: float, timeout_s: float, starts: int = 2) -> Hung:
    """Lets every start hang at the same step; raises RuntimeError where the log or the codes are not as they should."""
    codes, stacks_s, end_s, threads = [], 0.0, 0.0, 0
    workdir = folder / what
    name, index = late_record()
    job = dict(job=what, stall_s=stall_s, timeout_s=timeout_s, workdir=str(workdir))
    job |= dict(record=[name, index], once="/nonexistent")
    for _ in range(starts):
        with Job(folder, **job) as child:
            # A worker stalls while there still are batches: what counts is the wait for the one it owes.
            begin_s = when(child, lambda text: "stalls " in text)
            found_s = when(child, lambda text: "hung: " in text and "is MainThread\n" in text)
            code = child.process.wait(_ENDS_S)
            end_s, stacks_s = max(end_s, time.monotonic() - begin_s), max(stacks_s, found_s - begin_s)
            child.wait_until_gone()
            text = child.file.read_text()
            codes.append(code)
            threads = len(re.findall(r"^thread 0x\S+ is ", text, re.MULTILINE))
            if what == "worker" and (
                "stacks of data worker" not in text or f"reads record {index} of {name}" not in text
            ):
                raise RuntimeError(f"the log says nothing of the worker:\n{text[-3000:]}")
    if codes != [EXIT_AGAIN, EXIT_HUNG][:starts]:
        raise RuntimeError(f"{what}: ended with codes {codes}")
    # Batches that were ready are taken first, and the worker is started again: that is no part of the wait.
    if stacks_s > 2 * timeout_s + (_AGAIN_S if what == "worker" else 0):
        raise RuntimeError(f"{what}: stacks after {stacks_s:.1f} s, with a time-out of {timeout_s} s")
    return Hung(what, timeout_s, round(stacks_s, 2), round(end_s, 2), tuple(codes), threads)


def when(child: Job, said: Callable[[str], bool]) -> float:
    """The moment at which the log says so."""
    deadline_s = time.monotonic() + 180
    while not said(child.file.read_text()):
        if time.monotonic() > deadline_s or (child.process.poll() is not None and not said(child.file.read_text())):
            raise RuntimeError(f"the log does not say what it should; code {child.process.poll()}:\n{child.said()}")
        time.sleep(0.02)
    return time.monotonic()


def drill_hangs(folder: Path, long: bool) -> list[Hung]:
    stall_s, timeout_s = (30.0, 10.0) if long else (6.0, 2.0)
    hangs = []
    for what in ("worker", "step", "save", "stop"):
        # A worker must come back after a first stall, or the run would not be what hangs; and begin in time.
        in_worker = what == "worker"
        hangs.append(hang_at_one_step(folder, what, 300.0 if in_worker else stall_s, 10.0 if in_worker else timeout_s))
        print(hangs[-1], flush=True)
    stall_once(folder, 30.0)
    print("a worker that stalled once was started again, and the run went on", flush=True)
    return hangs


def stall_once(folder: Path, timeout_s: float) -> None:
    """Raises RuntimeError unless a run finishes whose worker stalls at its first start, and for longer than it may."""
    job = dict(job="worker once", stall_s=20 * timeout_s, timeout_s=timeout_s, once=str(folder / "once"))
    with Job(folder, record=late_record(), workdir=str(folder / "stalled"), **job) as child:
        code = child.process.wait(ENDS_S)
        child.wait_until_gone()
        if code != EXIT_FINISHED or "has stalled for " not in child.file.read_text():
            raise RuntimeError(f"a worker that stalled once ended the run, with code {code}:\n{child.said()}")


def drill_kills(folder: Path, kills: int) -> dict[str, Any]:
    batches = 60 + 40 * kills
    with Job(folder, job="digests", workers=2, kills=kills, batches=batches, seed=1) as child:
        killed = child.result()
    with Job(folder, job="digests", workers=0, kills=0, batches=batches, seed=1) as child:
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
    with Job(folder, job="starts", starts=starts) as child:
        left = child.result()
    if left != [[0, 0]] * starts:
        raise RuntimeError(f"children and segments that were left: {left}")
    print(f"{starts} starts and stops left 0 children and 0 files of shared memory", flush=True)
    return {"starts": starts, "children": 0, "segments": 0}


def drill_memory(folder: Path, batches: int) -> dict[str, float]:
    with Job(folder, job="memory", batches=batches, warm_up=batches // 2) as child:
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
    if job not in _TELLING:
        return hang(job)
    _TELLING[job]()
    return EXIT_FINISHED


@reports_user_errors
def main(arguments: Sequence[str] | None = None) -> int:
    skip_absent_tpu()
    parser = Parser(prog="python experiments/drills/hang.py", description="Lets things hang, die and pile up.")
    parser.add_argument("--long", action="store_true", help="the long form: some ten minutes")
    parser.add_argument("--json", type=Path, metavar="FILE", help="where the report goes")
    flags = parser.parse_args(arguments)
    if flags.json:
        check_output(flags.json, flag="--json")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(EXIT_TERMINATED))  # So that no child is left behind.
    with tempfile.TemporaryDirectory(prefix="drill-") as folder:
        path = Path(folder)
        report = {
            "hangs": [dataclasses.asdict(one) for one in drill_hangs(path, flags.long)],
            "kills": drill_kills(path, 10 if flags.long else 2),
            "starts": drill_starts(path, 20 if flags.long else 3),
            "memory_mib": drill_memory(path, 1000 if flags.long else 300),
        }
    if flags.json:
        flags.json.write_text(json.dumps(report, indent=1) + "\n")
    return EXIT_FINISHED


if __name__ == "__main__":
    sys.exit(work() if _JOB else main())
