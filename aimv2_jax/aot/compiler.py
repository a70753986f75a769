"""Runs the compiler in a subprocess, to the end or until it has a schedule, and collects its output."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from aimv2_jax.aot.program import AotProgram, ProgramFacts
from aimv2_jax.aot.topology import Topology
from aimv2_jax.aot.worker import Job
from aimv2_jax.config.load import config_to_dict
from aimv2_jax.config.schema import Config
from aimv2_jax.errors import UserError

_MODULE = "*after_optimizations_after_buffer_assignment.txt"
_MEMORY = "*memory-usage-report.txt"
_MAX_REFUSAL_CHARS = 400


def compile_step(config: Config, topology: Topology, full: bool) -> AotProgram:
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
                if not full and _is_scheduled(folder):
                    break
                time.sleep(0.2)
        finally:
            child.kill()
            child.wait()


def _dumped(folder: Path, pattern: str) -> list[Path]:
    """Returns the dumps of the TPU program that match; the worker may also run small programs on the CPU."""
    return [file for file in (folder / "dump").glob(pattern) if ".cpu_" not in file.name]


def _is_scheduled(folder: Path) -> bool:
    """Whether the schedule and the memory report exist and have stopped growing."""
    modules = _dumped(folder, _MODULE)
    reports = _dumped(folder, _MEMORY)
    if not (modules and reports):
        return False
    sizes = [file.stat().st_size for file in modules + reports]
    time.sleep(0.5)
    return sizes == [file.stat().st_size for file in modules + reports] and all(sizes)


def _collect(folder: Path, full: bool, seconds: float) -> AotProgram:
    if (folder / "user_error.json").exists():
        raise UserError(*json.loads((folder / "user_error.json").read_text()))
    log = (folder / "log.txt").read_text(errors="replace")
    if not (folder / "program.json").exists():
        raise RuntimeError(f"the compile process ended before compilation started:\n{log[-4000:]}")
    facts = ProgramFacts.from_json(json.loads((folder / "program.json").read_text()))
    if (folder / "error.txt").exists():
        message = " ".join((folder / "error.txt").read_text().split())
        shown = message if len(message) <= _MAX_REFUSAL_CHARS else message[:_MAX_REFUSAL_CHARS] + " ..."
        return AotProgram(facts, seconds, refusal=shown)
    modules = list(folder.glob("compiled.txt")) if full else _dumped(folder, _MODULE)
    if not modules:
        raise RuntimeError(f"the compile process died:\n{log[-4000:]}")
    memory = "\n".join(file.read_text() for file in _dumped(folder, _MEMORY))
    total = re.search(r"Memory Space: default.*?\nTotal bytes: (\d+)", memory, re.S)
    return AotProgram(facts, seconds, modules[0].read_text(), int(total[1]))
