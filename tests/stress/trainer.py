"""Tiny training run for drills, in a subprocess that is distinguishable from all others.

The subprocess runs this file (`python tests/stress/trainer.py FLAGS OF aimv2_jax.main`), and its workers import
it again.
"""

from __future__ import annotations

import contextlib
import json
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

from aimv2_jax.config.load import load_config  # noqa: E402
from aimv2_jax.config.schema import Config  # noqa: E402
from aimv2_jax.errors import EXIT_FINISHED  # noqa: E402
from tests.helpers.bytes_tokenizer import replace_tokenizer  # noqa: E402

QUICKSTART = ROOT / "experiments/quickstart.py"
SAVE_EVERY = 20
SETTINGS = {
    "model.encoder.width": 32, "model.encoder.depth": 2, "model.encoder.heads": 2, "model.encoder.hidden": 64,
    "model.decoder.width": 16, "model.decoder.depth": 2, "model.decoder.heads": 2, "model.decoder.hidden": 32,
    "model.decoder.text_length": 12, "model.layers": "scan",
    "optimizer.warmup_steps": 50, "optimizer.schedule_steps": 100_000,
    "data.image_size": 28, "data.batch_size": 16, "data.workers": 2,
    "eval.max_examples": 8, "eval.caption_types": "('alt',)", "eval.prefixes": "(0.5,)", "train.tensorboard": False,
    "train.log_every": 1, "train.save_every": SAVE_EVERY, "train.eval_every": 100,
}  # fmt: skip
# Fast start-up: compilation takes a third of the time, and all trainers of a drill share it.
_QUICK = {
    "XLA_FLAGS": "",  # One device.
    "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
}
TIMEOUT_S = 1200.0  # For every wait of a drill.
EXIT_TERMINATED = 128 + signal.SIGTERM
_CLEANUP_TIMEOUT_S = 10.0  # For all resources of an ended trainer to disappear.


def overrides(**changes: object) -> list[tuple[str, str]]:
    """Returns overrides of the quickstart's config; `changes` are keys with `__` for the dot."""
    settings = SETTINGS | {key.replace("__", "."): value for key, value in changes.items()}
    return [(key, str(value)) for key, value in settings.items()]


def trainer_flags(workdir: Path, **changes: object) -> list[str]:
    """Returns flags of `aimv2_jax.main`; runs in one folder share a compilation cache unless `changes` set another."""
    compiled = {"train__compilation_cache": workdir.parent / "compiled"}
    keys = [f"--config.{key}={value}" for key, value in overrides(**compiled | changes)]
    return [f"--config={QUICKSTART}", f"--workdir={workdir}", *keys]


def small_config(**changes: object) -> Config:
    return load_config(QUICKSTART, overrides(**changes))


class Child:
    """A file of the drills in a subprocess, whose processes are identifiable.

    Args:
      command: arguments of Python.
      log: file for the output of the process.
      variables: additional environment variables.
      output: destination of its stdout instead of the log, as for `subprocess.Popen`.
    """

    def __init__(self, command: list[str], log: Path, variables: dict[str, str] | None = None, output: Any = None):
        self.name = f"k{secrets.token_hex(3)}"
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
            raise RuntimeError(f"the process exited with code {self.process.returncode}:\n{self.log_tail()}")

    def finish(self) -> None:
        """Waits until the process has finished and its resources are gone."""
        if self.process.wait(TIMEOUT_S) != EXIT_FINISHED:
            raise RuntimeError(f"the process ended with code {self.process.returncode}:\n{self.log_tail()}")
        self.wait_until_gone()

    def log_tail(self) -> str:
        self._log.seek(0)
        return self._log.read()[-3000:]

    def wait_until_gone(self) -> float:
        """Waits for all resources of the ended process to disappear; returns the seconds."""
        start = time.monotonic()
        while left := self.resources():
            if time.monotonic() - start > _CLEANUP_TIMEOUT_S:
                raise RuntimeError(
                    f"still present {_CLEANUP_TIMEOUT_S:.0f} s after the trainer ended: {', '.join(left)}"
                )
            time.sleep(0.05)
        return time.monotonic() - start

    def resources(self) -> list[str]:
        """Lists its existing processes."""
        marker = f"DRILL_NAME={self.name}".encode()
        processes = []
        for folder in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):  # The process has ended, or belongs to another user.
                if marker in (folder / "environ").read_bytes().split(b"\0"):
                    processes.append(f"process {folder.name}")
        return processes


class Trainer(Child):
    """The trainer, slowed down by `step_s` in each step and by `save_s` in each commit of a save."""

    def __init__(self, workdir: Path, step_s: float = 0.0, save_s: float = 0.0, **changes: object):
        super().__init__(
            [__file__, *trainer_flags(workdir, **changes)],
            workdir.with_suffix(".log"),
            {"DRILL_SLOW_S": f"{step_s} {save_s}"},
        )


def last_step(workdir: Path) -> int:
    """Returns the last step in the metrics, or 0."""
    return next((line["step"] for line in _lines_backwards(workdir / "metrics.jsonl")), 0)


def count_lines(workdir: Path) -> int:
    """Counts the lines in the run's event log."""
    file = workdir / "events.jsonl"
    return file.read_bytes().count(b"\n") if file.exists() else 0


def saved_steps(workdir: Path, first_line: int) -> tuple[int, int | None]:
    """Returns the newest committed step (0: none), and the step of a save in progress, if any.

    Args:
      workdir: folder of the run.
      first_line: first line of the event log from the current start; saves of earlier starts can no longer finish.
    """
    from aimv2_jax.checkpoint.layout import FOLDER, absolute, committed_steps

    committed = max(committed_steps(absolute(workdir) / FOLDER), default=0)
    events = _lines_backwards(workdir / "events.jsonl", first_line)
    begun = next((event["step"] for event in events if event["kind"] == "save"), 0)
    return committed, begun if begun > committed else None


def start_step(workdir: Path, first_line: int) -> int | None:
    """Returns the step from which the start logged after `first_line` resumed; None if it did not get that far."""
    events = _lines_backwards(workdir / "events.jsonl", first_line)
    return next((event["step"] for event in events if event["kind"] == "start"), None)


def _lines_backwards(file: Path, after: int = 0) -> Iterator[dict[str, Any]]:
    """Yields the JSON lines of a file from line `after` on, last first; skips a partial line after a kill."""
    for line in reversed(file.read_text().splitlines()[after:] if file.exists() else []):
        with contextlib.suppress(ValueError):
            yield json.loads(line)


def _slow_down(step_s: float, save_s: float) -> None:
    """Delays every step by `step_s` and every commit by `save_s`."""
    from aimv2_jax.checkpoint import layout
    from aimv2_jax.train.builder import TrainSetup

    compile_step, commit = TrainSetup.compile_step, layout.commit
    layout.commit = lambda *args: (time.sleep(save_s), commit(*args))

    def compile_slow(*args: Any) -> Any:
        step = compile_step(*args)

        def slow(*arrays: Any) -> Any:
            time.sleep(step_s)
            return step(*arrays)

        return slow

    TrainSetup.compile_step = compile_slow


def main() -> int:
    """Runs the subprocess of a `Trainer`."""
    from aimv2_jax.main import main as train

    replace_tokenizer()
    _slow_down(*map(float, os.environ["DRILL_SLOW_S"].split()))
    return train(sys.argv[1:])


if __name__ == "__main__":
    sys.exit(main())
