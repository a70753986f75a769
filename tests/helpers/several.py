"""Starts several processes of one run on this machine, each on a CPU device, with the flags of a manual start."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from tests.helpers.bytes_tokenizer import SITE
from tests.helpers.tiny import ROOT

HOST = socket.gethostname()


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def outputs_of_two(code: str) -> list[list[str]]:
    """Runs `code` with arguments INDEX PORT in two processes; both must succeed. Returns the lines that each prints."""
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    options = dict(cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    port = str(free_port())
    running = [subprocess.Popen([sys.executable, "-c", code, str(index), port], **options) for index in range(2)]
    try:
        outputs = [process.communicate(timeout=120) for process in running]
    finally:
        for process in running:
            process.kill()
            process.wait()
    assert [process.returncode for process in running] == [0, 0], outputs
    return [[line for line in out.splitlines() if "Gloo" not in line] for out, _ in outputs]


class LocalProcesses:
    """`count` processes of `python -m aimv2_jax.main` with `arguments`; they write to `folder`/INDEX.out and .err.

    Args:
      indices: of the processes to start; by default all.
      changed: additional arguments of single processes, by index.
      setup: Python code that each process runs first.
    """

    def __init__(
        self,
        count: int,
        folder: Path,
        arguments: Sequence[str],
        indices: Sequence[int] | None = None,
        changed: dict[int, Sequence[str]] | None = None,
        setup: str = "",
    ):
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        site = folder / "site"
        site.mkdir(exist_ok=True)
        (site / "sitecustomize.py").write_text(SITE + setup)
        environment = os.environ | {
            "PYTHONPATH": f"{site}{os.pathsep}{ROOT}",
            "JAX_PLATFORMS": "cpu",
            "XLA_FLAGS": "--xla_force_host_platform_device_count=1",
        }
        self.coordinator = f"127.0.0.1:{free_port()}"
        self.processes: dict[int, subprocess.Popen] = {}
        for index in range(count) if indices is None else indices:
            flags = ["--coordinator", self.coordinator, "--processes", str(count), "--process", str(index)]
            command = [sys.executable, "-m", "aimv2_jax.main", *arguments, *(flags if count > 1 else [])]
            with (folder / f"{index}.out").open("w") as out, (folder / f"{index}.err").open("w") as err:
                self.processes[index] = subprocess.Popen(
                    [*command, *(changed or {}).get(index, ())], cwd=ROOT, env=environment, stdout=out, stderr=err
                )

    def __enter__(self) -> LocalProcesses:
        return self

    def __exit__(self, *exception: object) -> None:
        for process in self.processes.values():
            process.kill()
            process.wait()

    def output(self, index: int) -> tuple[str, str]:
        """The contents of stdout and stderr of process `index` so far."""
        return (self.folder / f"{index}.out").read_text(), (self.folder / f"{index}.err").read_text()

    def wait(self, timeout_s: float = 240) -> dict[int, int]:
        """The exit codes, by index."""
        deadline_s = time.monotonic() + timeout_s
        return {i: process.wait(max(0.0, deadline_s - time.monotonic())) for i, process in self.processes.items()}

    def finish(self) -> None:
        """Waits until all processes have finished their run."""
        codes = self.wait()
        assert not any(codes.values()), (codes, [self.output(index) for index in codes])

    def wait_for(self, condition: Callable[[], bool], timeout_s: float = 240) -> None:
        deadline_s = time.monotonic() + timeout_s
        while not condition():
            ended = [index for index, process in self.processes.items() if process.poll() is not None]
            assert not ended and time.monotonic() < deadline_s, [self.output(index) for index in self.processes]
            time.sleep(0.05)

    def kill(self, index: int, number: int = signal.SIGKILL) -> float:
        """Sends the signal; returns the time."""
        self.processes[index].send_signal(number)
        return time.monotonic()
