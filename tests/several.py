"""Several processes on this machine that train as one, each on a CPU device, started as a user starts them by hand."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from tiny import ROOT

from experiments.drills.bytes_tokenizer import SITE

HOST = socket.gethostname()


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def outputs_of_two(code: str) -> list[list[str]]:
    """The lines that two processes print which run `code` with arguments INDEX PORT; both must end well."""
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    options = dict(cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    port = str(free_port())
    running = [subprocess.Popen([sys.executable, "-c", code, str(index), port], **options) for index in range(2)]
    try:
        said = [one.communicate(timeout=120) for one in running]
    finally:
        for one in running:
            one.kill()
            one.wait()
    assert [one.returncode for one in running] == [0, 0], said
    return [[line for line in out.splitlines() if "Gloo" not in line] for out, _ in said]


class Several:
    """`python -m aimv2_jax.main` with `arguments`, `count` times; what each says goes to `folder`/INDEX.out and .err.

    Args:
      indices: those that are started; all, unless given.
      changed: arguments that some are given besides, by index.
      setup: Python that each runs before anything else.
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

    def __enter__(self) -> Several:
        return self

    def __exit__(self, *exception: object) -> None:
        for process in self.processes.values():
            process.kill()
            process.wait()

    def said(self, index: int) -> tuple[str, str]:
        """What it has said so far: on its output, and on its error output."""
        return (self.folder / f"{index}.out").read_text(), (self.folder / f"{index}.err").read_text()

    def wait(self, timeout_s: float = 240) -> dict[int, int]:
        """The exit codes, by index."""
        deadline_s = time.monotonic() + timeout_s
        return {i: one.wait(max(0.0, deadline_s - time.monotonic())) for i, one in self.processes.items()}

    def finish(self) -> None:
        """Waits until all have finished their run."""
        codes = self.wait()
        assert not any(codes.values()), (codes, [self.said(index) for index in codes])

    def wait_for(self, condition: Callable[[], bool], timeout_s: float = 240) -> None:
        deadline_s = time.monotonic() + timeout_s
        while not condition():
            ended = [index for index, one in self.processes.items() if one.poll() is not None]
            assert not ended and time.monotonic() < deadline_s, [self.said(index) for index in self.processes]
            time.sleep(0.05)

    def kill(self, index: int, number: int = signal.SIGKILL) -> float:
        """Sends the signal; when."""
        self.processes[index].send_signal(number)
        return time.monotonic()
