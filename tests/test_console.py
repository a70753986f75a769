"""Tests of printing to closed outputs: the program continues and keeps its exit code."""

from __future__ import annotations

import os
import subprocess
import sys

from tests.helpers.tiny import ROOT

PROGRAM = """
import sys, time
from aimv2_jax.console import print_line
sys.stdin.readline()  # Waits until the reader has closed the pipe.
for output in (sys.stdout, sys.stderr):
    print_line("once", output)
    print_line("more " * 10_000, output)
print("left in the buffer")
sys.exit(7)
"""


def test_print_line_without_reader():
    """A pipe without a reader raises EPIPE; a non-empty buffer of Python would make the exit code 120."""
    command = [sys.executable, "-c", PROGRAM]
    pipe, env = subprocess.PIPE, os.environ | {"PYTHONPATH": str(ROOT)}
    with subprocess.Popen(command, env=env, stdin=pipe, stdout=pipe, stderr=pipe) as process:
        process.stdout.close()
        process.stderr.close()
        process.stdin.write(b"\n")
        process.stdin.close()
        assert process.wait(30) == 7


def test_print_line_when_read(capsys):
    from aimv2_jax.console import print_line

    print_line("a line")
    print_line("a line", sys.stderr)
    assert tuple(capsys.readouterr()) == ("a line\n", "a line\n")


def test_print_line_when_the_reader_is_slow():
    """A full non-blocking pipe raises EAGAIN: that line is dropped, later ones are printed."""
    from aimv2_jax.console import print_line

    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    with open(reading, "rb", buffering=0) as pipe, open(writing, "w") as output:
        print_line("x" * 1_000_000, output)
        assert set(pipe.read(1 << 20)) == set(b"x")
        print_line("later", output)
        assert pipe.read(1 << 20) == b"later\n"


def test_exit_code_when_the_disk_of_its_output_is_full():
    code = "import sys; from aimv2_jax.console import print_line; print_line('once'); sys.exit(7)"
    with open("/dev/full", "wb") as full:
        assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, stdout=full, timeout=60).returncode == 7


def test_command_when_its_output_is_gone():
    """Without a reader for the error message, the exit code is still that of a user error."""
    command = f"{sys.executable} -m aimv2_jax.main --config=nowhere.py --workdir=x"
    pipe = f"set -o pipefail; (exec {command}) 2>&1 | true"
    done = subprocess.run(["bash", "-c", pipe], cwd=ROOT, capture_output=True, timeout=60)
    assert done.returncode == 2
