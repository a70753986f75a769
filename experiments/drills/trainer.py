"""The run that drills break: a tiny model, in a process of its own that can be told from all others.

What it shares in memory gets names of its own, since other programs of the machine have segments, too. It is this file
that runs there (`python experiments/drills/trainer.py FLAGS OF aimv2_jax.main`), and that its workers import again.
"""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import multiprocessing.shared_memory
import os
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [] if str(ROOT) in sys.path else [str(ROOT)]

NAME = os.environ.get("DRILL_NAME", "")  # Of this process and its workers, where a drill has started them.
if NAME:
    multiprocessing.shared_memory._SHM_NAME_PREFIX = f"/{NAME}"
    multiprocessing.current_process()._config["semprefix"] = f"/{NAME}"

from aimv2_jax.config import Config, load_config  # noqa: E402
from aimv2_jax.errors import EXIT_FINISHED  # noqa: E402
from experiments.drills.bytes_tokenizer import replace_tokenizer  # noqa: E402

QUICKSTART = ROOT / "experiments/quickstart.py"
SAVE_EVERY = 20
SETTINGS = {
    "model.encoder.width": 32, "model.encoder.depth": 2, "model.encoder.heads": 2, "model.encoder.hidden": 64,
    "model.decoder.width": 16, "model.decoder.depth": 2, "model.decoder.heads": 2, "model.decoder.hidden": 32,
    "model.decoder.text_length": 12, "model.layers": "scan",
    "optimizer.warmup_steps": 50, "optimizer.schedule_steps": 100_000,
    "data.image_size": 28, "data.batch_size": 16, "data.workers": 2,
    "eval.max_examples": 8, "eval.kinds": "('alt',)", "eval.prefixes": "(0.5,)", "train.tensorboard": False,
    "train.log_every": 1, "train.save_every": SAVE_EVERY, "train.eval_every": 100,
}  # fmt: skip
# So that a start is quick: a third of the time to compile, and that once for all trainers of a drill.
_QUICK = {
    "XLA_FLAGS": "",  # One device.
    "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
}
ENDS_S = 1200.0  # Within which whatever a drill waits for comes, or never will.
EXIT_TERMINATED = 128 + signal.SIGTERM
_GONE_S = 10.0  # Within which all that an ended trainer had must be gone.


def overrides(**changes: object) -> list[tuple[str, str]]:
    """Of the quickstart's config; `changes` are keys with `__` for the dot."""
    settings = SETTINGS | {key.replace("__", "."): value for key, value in changes.items()}
    return [(key, str(value)) for key, value in settings.items()]


def trainer_flags(workdir: Path, **changes: object) -> list[str]:
    """Of `aimv2_jax.main`; the runs of one folder share what they compile, unless it is to be kept elsewhere."""
    compiled = {"train__compilation_cache": workdir.parent / "compiled"}
    keys = [f"--config.{key}={value}" for key, value in overrides(**compiled | changes)]
    return [f"--config={QUICKSTART}", f"--workdir={workdir}", *keys]


def small_config(**changes: object) -> Config:
    return load_config(QUICKSTART, overrides(**changes))


class Child:
    """A file of the drills in a process of its own, whose processes and shared memory can be told from others'.

    Args:
      command: what Python is given.
      log: a file that gets what the process says.
      variables: more of its environment.
      output: where its standard output goes instead, as for `subprocess.Popen`.
    """

    def __init__(self, command: list[str], log: Path, variables: dict[str, str] | None = None, output: Any = None):
        self.name = f"k{secrets.token_hex(3)}"  # Names of segments may have 14 letters.
        self._log = log.open("a+")
        self.process = subprocess.Popen(
            [sys.executable, *command],
            env=os.environ | _QUICK | {"DRILL_NAME": self.name} | (variables or {}),
            stdout=self._log if output is None else output,
            stderr=self._log,
            text=True,
        )

    def __enter__(self) -> Child:
        return self

    def __exit__(self, *exception: object) -> None:
        self.process.kill()
        self.process.wait()
        if self.process.stdout is not None:
            self.process.stdout.close()
        self._log.close()

    def check_running(self) -> None:
        if self.process.poll() is not None:
            raise RuntimeError(f"it ended by itself, with code {self.process.returncode}:\n{self.said()}")

    def finish(self) -> None:
        """Waits until it has finished, and all that it had is gone."""
        if self.process.wait(ENDS_S) != EXIT_FINISHED:
            raise RuntimeError(f"it ended with code {self.process.returncode}:\n{self.said()}")
        self.wait_until_gone()

    def said(self) -> str:
        self._log.seek(0)
        return self._log.read()[-3000:]

    def wait_until_gone(self) -> float:
        """Seconds until nothing of the ended process is left."""
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


class Trainer(Child):
    """The trainer; its steps, and the last stroke of its saves, take `step_s` and `save_s` longer than they need."""

    def __init__(self, workdir: Path, step_s: float = 0.0, save_s: float = 0.0, **changes: object):
        super().__init__(
            [__file__, *trainer_flags(workdir, **changes)],
            workdir.with_suffix(".log"),
            {"DRILL_SLOW_S": f"{step_s} {save_s}"},
        )


def last_step(workdir: Path) -> int:
    """The last step in the metrics; 0 where there is none."""
    return next((line["step"] for line in _lines_backwards(workdir / "metrics.jsonl")), 0)


def count_lines(workdir: Path) -> int:
    """In the run's books so far."""
    file = workdir / "events.jsonl"
    return file.read_bytes().count(b"\n") if file.exists() else 0


def steps_in(workdir: Path, told: int) -> tuple[int, int | None]:
    """The newest step that is saved whole (0: none), and the one whose save has begun, if any.

    Args:
      workdir: of the run.
      told: lines of its books that an earlier start wrote: their saves will come to nothing any more.
    """
    from aimv2_jax.train.step_folders import FOLDER, absolute, committed_steps

    whole = max(committed_steps(absolute(workdir) / FOLDER), default=0)
    events = _lines_backwards(workdir / "events.jsonl", told)
    begun = next((event["step"] for event in events if event["kind"] == "save"), 0)
    return whole, begun if begun > whole else None


def start_step(workdir: Path, told: int) -> int | None:
    """The step from which a start went on that came after `told` lines of the books; None where it came to no step."""
    events = _lines_backwards(workdir / "events.jsonl", told)
    return next((event["step"] for event in events if event["kind"] == "start"), None)


def _lines_backwards(file: Path, after: int = 0) -> Iterator[dict[str, Any]]:
    """The lines of a file from number `after` on, the last first; half of one, which a kill left, is passed over."""
    for line in reversed(file.read_text().splitlines()[after:] if file.exists() else []):
        with contextlib.suppress(ValueError):
            yield json.loads(line)


def _slow_down(step_s: float, save_s: float) -> None:
    """Lets every step, and every save before it counts, take so much longer."""
    from aimv2_jax.train import step_folders
    from aimv2_jax.train.program import Program

    compile_step, commit = Program.compile_step, step_folders.commit
    step_folders.commit = lambda *args: (time.sleep(save_s), commit(*args))

    def compile_slow(*args: Any) -> Any:
        step = compile_step(*args)

        def slow(*arrays: Any) -> Any:
            time.sleep(step_s)
            return step(*arrays)

        return slow

    Program.compile_step = compile_slow


def main() -> int:
    """What the process of a `Trainer` does."""
    from aimv2_jax.main import main as train

    replace_tokenizer()
    _slow_down(*map(float, os.environ["DRILL_SLOW_S"].split()))
    return train(sys.argv[1:])  # In this process, whose names for shared memory the drill knows.


if __name__ == "__main__":
    sys.exit(main())
