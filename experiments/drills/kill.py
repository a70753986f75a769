"""Kills a small run at random moments, goes on with it, and compares what comes out with a run that was left alone.

python experiments/drills/kill.py --kills 20 --json kill.json

Each kill is a SIGKILL to the trainer at a random moment, up to one and a half times what its first step takes to come:
while it imports, compiles, reads, trains, evaluates or saves. After each of them no process of it, no shared memory and
no semaphore may be left; after the last, its parameters and its metrics must be those of the other run, bit for bit.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import multiprocessing
import multiprocessing.shared_memory
import os
import random
import secrets
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

# The trainer below is this file too, and its workers import it again: what they share in memory gets names of its own,
# since other programs of the machine have segments, too.
_NAME = os.environ.get("DRILL_NAME")
if _NAME:
    multiprocessing.shared_memory._SHM_NAME_PREFIX = f"/{_NAME}"
    multiprocessing.current_process()._config["semprefix"] = f"/{_NAME}"

from aimv2_jax.errors import EXIT_FINISHED, UserError, reports_user_errors  # noqa: E402
from aimv2_jax.flags import Parser, check_output  # noqa: E402
from aimv2_jax.platforms import skip_absent_tpu  # noqa: E402

QUICKSTART = ROOT / "experiments/quickstart.py"
SETTINGS = {
    "model.encoder.width": 32, "model.encoder.depth": 2, "model.encoder.heads": 2, "model.encoder.hidden": 64,
    "model.decoder.width": 16, "model.decoder.depth": 2, "model.decoder.heads": 2, "model.decoder.hidden": 32,
    "model.decoder.text_length": 12, "model.layers": "scan",
    "optimizer.warmup_steps": 50, "optimizer.schedule_steps": 100_000,
    "data.image_size": 28, "data.batch_size": 16, "data.workers": 2,
    "eval.max_examples": 8, "eval.kinds": "('alt',)", "eval.prefixes": "(0.5,)",
    "train.log_every": 1, "train.save_every": 20, "train.eval_every": 100,
}  # fmt: skip
_GONE_S = 10.0  # Within which all that an ended trainer had must be gone.
_START_S = 600.0  # A trainer that has done no step in this time never will.
EXIT_TERMINATED = 128 + signal.SIGTERM
_MORE_STEPS = 20  # That the run takes in peace after the last kill.


def trainer_command(workdir: Path, steps: int) -> list[str]:
    keys = [f"--config.{key}={value}" for key, value in SETTINGS.items()]
    return [
        sys.executable,
        __file__,
        f"--config={QUICKSTART}",
        f"--workdir={workdir}",
        f"--config.train.steps={steps}",
        *keys,
    ]


class Trainer:
    """A trainer in a process of its own, whose processes and shared memory can be told from others'."""

    def __init__(self, workdir: Path, steps: int):
        self.name = f"k{secrets.token_hex(3)}"  # Names of segments may have 14 letters.
        self._log = (workdir.parent / f"{workdir.name}.log").open("a+")
        environment = os.environ | {"DRILL_NAME": self.name}
        self.process = subprocess.Popen(
            trainer_command(workdir, steps), env=environment, stdout=self._log, stderr=subprocess.STDOUT
        )

    def __enter__(self) -> Trainer:
        return self

    def __exit__(self, *exception: object) -> None:
        self.process.kill()
        self.process.wait()
        self._log.close()

    def check_running(self) -> None:
        if self.process.poll() is not None:
            raise RuntimeError(f"the trainer ended by itself, with code {self.process.returncode}:\n{self.said()}")

    def finish(self) -> None:
        if self.process.wait() != EXIT_FINISHED:
            raise RuntimeError(f"the trainer ended with code {self.process.returncode}:\n{self.said()}")

    def said(self) -> str:
        self._log.seek(0)
        return self._log.read()[-3000:]

    def wait_until_gone(self) -> float:
        """Seconds until nothing of the ended trainer is left."""
        start = time.monotonic()
        while left := self.left():
            if time.monotonic() - start > _GONE_S:
                raise RuntimeError(f"left {_GONE_S:.0f} s after the trainer ended: {', '.join(left)}")
            time.sleep(0.05)
        return time.monotonic() - start

    def left(self) -> list[str]:
        """Its processes, segments and semaphores that are there."""
        marker, found = f"DRILL_NAME={self.name}".encode(), []
        for folder in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):  # Ends while we look, or is another user's.
                if marker in (folder / "environ").read_bytes().split(b"\0"):
                    found.append(f"process {folder.name}")
        return found + [name for name in os.listdir("/dev/shm") if name.startswith((self.name, f"sem.{self.name}"))]


@dataclasses.dataclass(frozen=True)
class Kill:
    """Seconds after the start, the last logged step, how many processes and segments were there, and how soon gone."""

    after_s: float
    step: int
    met: int
    gone_after_s: float


def kill_once(workdir: Path, after_s: float) -> Kill:
    """Starts the trainer, kills it after `after_s`, and waits until nothing of it is left."""
    with Trainer(workdir, steps=10**6) as trainer:
        time.sleep(after_s)
        trainer.check_running()
        met = len(trainer.left())
        trainer.process.send_signal(signal.SIGKILL)
        trainer.process.wait()
        gone_after_s = trainer.wait_until_gone()
        return Kill(round(after_s, 2), last_step(workdir), met, round(gone_after_s, 2))


def last_step(workdir: Path) -> int:
    """The last step in the metrics, which may end in half a line; 0 where there is none."""
    file = workdir / "metrics.jsonl"
    lines = file.read_text().splitlines() if file.exists() else []
    for line in reversed(lines):
        with contextlib.suppress(ValueError):
            return json.loads(line)["step"]
    return 0


def start_up_s(workdir: Path) -> float:
    """How long a trainer takes until its first step is in the metrics."""
    start = time.monotonic()
    with Trainer(workdir, steps=10**6) as trainer:
        while not last_step(workdir):
            trainer.check_running()
            if time.monotonic() - start > _START_S:
                raise RuntimeError(f"no step within {_START_S:.0f} s:\n{trainer.said()}")
            time.sleep(0.02)
    return time.monotonic() - start


def compare(workdir: Path, straight: Path, steps: int) -> int:
    """Numbers of the state; raises AssertionError unless it and the metrics of both runs are the same bit for bit."""
    import jax
    import numpy as np

    from aimv2_jax.config import load_config
    from aimv2_jax.train.checkpoint import CheckpointReader
    from aimv2_jax.train.metrics import read_metrics
    from aimv2_jax.train.program import build_program

    program = build_program(load_config(QUICKSTART, [(key, str(value)) for key, value in SETTINGS.items()]))
    one, other = (
        jax.tree.leaves(jax.device_get(CheckpointReader(path).restore(steps, program.abstract_state)))
        for path in (workdir, straight)
    )
    assert all(a.dtype == b.dtype and np.array_equal(a, b) for a, b in zip(one, other, strict=True)), "states differ"
    timed = ("images_per_s", "step_time_s", "data_wait_fraction", "data_queue_depth", "mfu")
    timed += ("save_stall_s", "model_tflops_per_s")
    lines = [
        [[{k: v for k, v in line.items() if k not in timed} for line in part] for part in read_metrics(path)]
        for path in (workdir, straight)
    ]
    assert [line["step"] for line in lines[0][0]] == list(range(1, steps + 1)), "a step is missing, or stands twice"
    assert lines[0] == lines[1], "metrics differ"
    return sum(leaf.size for leaf in one)


@reports_user_errors
def main(arguments: Sequence[str] | None = None) -> int:
    skip_absent_tpu()
    parser = Parser(prog="python experiments/drills/kill.py", description="Kills a run at random moments.")
    parser.add_argument("--kills", type=int, default=20, help="how often (default %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the moments (default %(default)s)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="where the report goes")
    flags = parser.parse_args(arguments)
    if flags.kills < 1:
        raise UserError("--kills is too small", flags.kills, "Give at least 1")
    if flags.json:
        check_output(flags.json, flag="--json")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(EXIT_TERMINATED))  # So that no trainer is left behind.
    moments = random.Random(flags.seed)
    with tempfile.TemporaryDirectory(prefix="drill-") as folder:
        workdir, straight = Path(folder) / "killed", Path(folder) / "straight"
        workdir.mkdir(), straight.mkdir()
        span_s = 1.5 * start_up_s(workdir)
        kills = []
        for number in range(1, flags.kills + 1):
            kills.append(kill_once(workdir, moments.uniform(0, span_s)))
            print(f"kill {number}/{flags.kills}: {kills[-1]}", flush=True)
        steps = last_step(workdir) + _MORE_STEPS
        for path in (workdir, straight):
            with Trainer(path, steps) as trainer:
                trainer.finish()
                trainer.wait_until_gone()
        numbers = compare(workdir, straight, steps)
    report = {"kills": [dataclasses.asdict(kill) for kill in kills], "steps": steps, "numbers_compared": numbers}
    if flags.json:
        flags.json.write_text(json.dumps(report, indent=1) + "\n")
    print(
        f"{len(kills)} kills, {steps} steps: "
        f"all {numbers:,} numbers of the state and all metrics are those of the run that was left alone"
    )
    return EXIT_FINISHED


if __name__ == "__main__":
    if _NAME:
        from aimv2_jax.main import main as trainer_main

        sys.exit(trainer_main())
    sys.exit(main())
