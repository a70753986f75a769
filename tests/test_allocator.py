"""Tests by page faults that malloc keeps freed memory where JAX computes on the CPU, and only there."""

from __future__ import annotations

import importlib
import os
import platform
import subprocess
import sys
from types import SimpleNamespace

import pytest
from tiny import ROOT

from aimv2_jax import platforms
from aimv2_jax.allocator import keep_freed_memory
from aimv2_jax.errors import EXIT_USER, UserError
from aimv2_jax.platforms import is_cpu_only

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
def test_memory_when_on_cpu_then_freed_pages_are_kept():
    first, second = faults_twice("assert keep_freed_memory()", 256)
    # The first block begins in the pages that the imports freed, which are kept, too.
    assert first > 0.99 * PAGES and second < PAGES // 100


@glibc
@pytest.mark.parametrize(
    "environment", [{"AIMV2_JAX_MALLOC": "default"}, {"JAX_PLATFORMS": "unknown"}], ids=["default", "no CPU run"]
)
def test_memory_when_not_to_be_kept_then_given_back(environment):
    first, second = faults_twice("assert not keep_freed_memory()", 256, **environment)
    assert first >= PAGES and second >= PAGES


@glibc
def test_pictures_when_freed_then_kept_to_a_limit():
    assert faults_twice("assert keep_freed_image_buffers()", 16)[1] < 100
    assert faults_twice("assert keep_freed_image_buffers()", 256)[1] >= PAGES


@pytest.mark.parametrize("command", COMMANDS)
def test_malloc_when_unknown_then_one_sentence(command, monkeypatch, capsys):
    monkeypatch.setenv("AIMV2_JAX_MALLOC", "never")
    assert importlib.import_module(f"aimv2_jax.{command}").main([]) == EXIT_USER
    assert capsys.readouterr().err.startswith("error: AIMV2_JAX_MALLOC is unknown: 'never'.")
    with pytest.raises(UserError):
        keep_freed_memory()


# Case -> (JAX_PLATFORMS, present accelerators, whether JAX computes on the CPU).
CHOICES = {
    "no accelerator": ("", set(), True),
    "a GPU is present": ("", {"gpu"}, False),
    "a TPU is present": ("", {"tpu"}, False),
    "CPU chosen beside a GPU": ("cpu", {"gpu"}, True),
    "an absent GPU is preferred": ("cuda,cpu", set(), True),
    "a GPU is preferred": ("cuda,cpu", {"gpu"}, False),
    "a TPU is chosen": ("tpu,cpu", {"tpu"}, False),
    "an unknown platform": ("other,cpu", set(), False),
}


@pytest.mark.parametrize("jax_is_imported", [False, True])
@pytest.mark.parametrize("case", CHOICES)
def test_platform_when_chosen_or_found_then_known(case, jax_is_imported, monkeypatch):
    chosen, present, expected = CHOICES[case]
    for name in ("gpu", "tpu"):
        monkeypatch.setattr(platforms, f"may_have_{name}", lambda name=name: name in present)
    monkeypatch.setattr(platforms, "_plugins", lambda: [])
    imported = SimpleNamespace(config=SimpleNamespace(jax_platforms=chosen)) if jax_is_imported else None
    monkeypatch.setitem(sys.modules, "jax", imported)
    monkeypatch.setenv("JAX_PLATFORMS", "other" if jax_is_imported else chosen)  # JAX has read it by then.
    assert is_cpu_only() is expected
