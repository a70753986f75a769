"""Runs the compiler in a subprocess, to the end or until it has a schedule, and collects its output."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from aimv2_jax.aot.topology import Topology
from aimv2_jax.aot.worker import Job
from aimv2_jax.config import Config, config_to_dict
from aimv2_jax.errors import UserError

_MODULE = "*after_optimizations_after_buffer_assignment.txt"
_MEMORY = "*memory-usage-report.txt"


@dataclasses.dataclass(frozen=True)
class Compiled:
    """A compiled step. `refusal` is the compiler's message if the step does not compile."""

    program: dict[str, Any]  # The output of `worker.describe`.
    text: str  # The scheduled module; with cycle estimates if it was compiled in full.
    hbm_bytes: int
    compiler_flops: float | None  # Its own FLOP count; None without code generation.
    refusal: str | None
    seconds: float


def compile_step(config: Config, topology: Topology, full: bool) -> Compiled:
    """Compiles the run's own train step for a described topology.

    With `full`, code generation runs too; otherwise the compiler stops once schedule and buffers are known.

    Raises:
      UserError: if the config, the mesh or the topology do not fit together.
    """
    with tempfile.TemporaryDirectory(prefix="aot-") as name:
        folder = Path(name)
        job = Job(config_to_dict(config), topology.name, topology.slices, full, name)
        start = time.monotonic()
        _run_worker(job.write(), folder, full)
        return _collect(folder, full, time.monotonic() - start)


def _run_worker(job: Path, folder: Path, full: bool) -> None:
    flags = f"--xla_dump_to={folder}/dump --xla_dump_hlo_as_text"
    environment = dict(os.environ, XLA_FLAGS=f"{os.environ.get('XLA_FLAGS', '')} {flags}".strip())
    # The module is parsed once and never run, and a cache hit would dump nothing.
    environment.pop("JAX_COMPILATION_CACHE_DIR", None)
    # The prediction is for the fully optimised program.
    environment.pop("JAX_DISABLE_MOST_OPTIMIZATIONS", None)
    with (folder / "log.txt").open("wb") as log:
        child = subprocess.Popen(
            [sys.executable, "-m", "aimv2_jax.aot.worker", str(job)], env=environment, stdout=log, stderr=log
        )
        try:
            while child.poll() is None:
                if not full and _is_scheduled(folder / "dump"):
                    break
                time.sleep(0.2)
        finally:
            child.kill()
            child.wait()


def _is_scheduled(dump: Path) -> bool:
    """Whether the schedule and the memory report exist and have stopped growing."""
    files = [file for pattern in (_MODULE, _MEMORY) for file in dump.glob(pattern) if ".cpu_" not in file.name]
    if not all(any(file.match(pattern) for file in files) for pattern in (_MODULE, _MEMORY)):
        return False
    sizes = [file.stat().st_size for file in files]
    time.sleep(0.5)
    return sizes == [file.stat().st_size for file in files] and all(sizes)


def _collect(folder: Path, full: bool, seconds: float) -> Compiled:
    if (folder / "user_error.json").exists():
        raise UserError(*json.loads((folder / "user_error.json").read_text()))
    log = (folder / "log.txt").read_text(errors="replace")
    if not (folder / "program.json").exists():
        raise RuntimeError(f"the compile process ended before compilation started:\n{log[-4000:]}")
    program = json.loads((folder / "program.json").read_text())
    if (folder / "error.txt").exists():
        return Compiled(program, "", 0, None, _shorten((folder / "error.txt").read_text()), seconds)
    dump = folder / "dump"
    memory = [file.read_text() for file in dump.glob(_MEMORY) if ".cpu_" not in file.name]
    if full and (folder / "compiled.json").exists():
        text = (folder / "compiled.txt").read_text()
        flops = json.loads((folder / "compiled.json").read_text())["flops"]
    elif not full and any(dump.glob(_MODULE)):
        text, flops = next(dump.glob(_MODULE)).read_text(), None
    else:
        raise RuntimeError(f"the compile process died:\n{log[-4000:]}")
    total = re.search(r"Memory Space: default.*?\nTotal bytes: (\d+)", "\n".join(memory), re.S)
    return Compiled(program, text, int(total[1]), flops, None, seconds)


def _shorten(error: str) -> str:
    """Returns the start of the compiler's error message, on one line."""
    message = " ".join(error.split())
    return message if len(message) <= 400 else message[:400] + " ..."
