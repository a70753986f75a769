"""Tests by page faults that malloc keeps freed memory where JAX computes on the CPU, and only there."""

from __future__ import annotations

import importlib
import os
import platform
import subprocess
import sys
from types import SimpleNamespace

import pytest

from aimv2_jax import allocator
from aimv2_jax.allocator import keep_freed_memory
from aimv2_jax.errors import EXIT_USER, UserError
from tests.helpers.tiny import ROOT

EVALUATIONS = ["features", "heldout", "probes.__main__", "retrieval", "visualize", "zeroshot"]
COMMANDS = ["main", *(f"eval.{name}" for name in EVALUATIONS)]
PAGES = (256 << 20) // 4096
# Prints the page faults of two blocks of memory; the second is allocated after the first was freed.
TWICE = """
import resource
from aimv2_jax.allocator import keep_freed_memory, keep_freed_image_buffers
{call}
def faults(megabytes):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    block = bytearray(b"x") * (megabytes << 20)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
print(faults({megabytes}), faults({megabytes}))
"""
glibc = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="settings of glibc")


def faults_twice(call: str, megabytes: int, **environment: str) -> list[int]:
    code = TWICE.format(call=call, megabytes=megabytes)
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu", **environment}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True)
    return [int(word) for word in done.stdout.split()]


@glibc
def test_keep_freed_memory_on_cpu():
    """Freed pages stay with the process in a run on the CPU."""
    first, second = faults_twice("assert keep_freed_memory()", 256)
    # The first block begins in the pages that the imports freed, which are kept, too.
    assert first > 0.99 * PAGES and second < PAGES // 100


@glibc
@pytest.mark.parametrize(
    "environment", [{"AIMV2_JAX_MALLOC": "default"}, {"JAX_PLATFORMS": "unknown"}], ids=["default", "no CPU run"]
)
def test_freed_memory_returned(environment):
    """Freed memory is returned to the system if the process is not to keep it."""
    first, second = faults_twice("assert not keep_freed_memory()", 256, **environment)
    assert first >= PAGES and second >= PAGES


@glibc
def test_freed_image_buffers_limit():
    """The process keeps freed image buffers up to a limit."""
    assert faults_twice("assert keep_freed_image_buffers()", 16)[1] < 100
    assert faults_twice("assert keep_freed_image_buffers()", 256)[1] >= PAGES


@pytest.mark.parametrize("command", COMMANDS)
def test_malloc_when_unknown_then_one_sentence(command, monkeypatch, capsys):
    monkeypatch.setenv("AIMV2_JAX_MALLOC", "never")
    assert importlib.import_module(f"aimv2_jax.{command}").main([]) == EXIT_USER
    assert capsys.readouterr().err.startswith("error: AIMV2_JAX_MALLOC is unknown: 'never'.")
    with pytest.raises(UserError):
        keep_freed_memory()


@pytest.mark.parametrize("jax_is_imported", [False, True])
@pytest.mark.parametrize(("chosen", "expected"), [("", False), ("cpu", True), ("cuda,cpu", False), ("other", False)])
def test_keep_freed_memory_only_on_cpu(chosen, expected, jax_is_imported, monkeypatch):
    """Freed memory is kept where JAX's only platform is the CPU: by its config or, before its import, its variable."""
    monkeypatch.setattr(allocator, "_set_mallopt", lambda settings: True)
    imported = SimpleNamespace(config=SimpleNamespace(jax_platforms=chosen)) if jax_is_imported else None
    monkeypatch.setitem(sys.modules, "jax", imported)
    monkeypatch.setenv("JAX_PLATFORMS", "other" if jax_is_imported else chosen)  # JAX has read it by then.
    assert keep_freed_memory() is expected
