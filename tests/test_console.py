"""Lines on outputs that are gone: the program goes on, and ends as it would have."""

from __future__ import annotations

import os
import subprocess
import sys

from tiny import ROOT

PROGRAM = """
import sys, time
from aimv2_jax.console import print_line
sys.stdin.readline()  # Until the reader is gone.
for output in (sys.stdout, sys.stderr):
    print_line("once", output)
    print_line("more " * 10_000, output)
print("left in the buffer")
sys.exit(7)
"""


def test_print_line_when_nobody_reads():
    """A pipe without a reader raises EPIPE, and what stays in Python's buffer would make the exit code 120."""
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

    print_line("to people")
    print_line("to people", sys.stderr)
    assert tuple(capsys.readouterr()) == ("to people\n", "to people\n")


def test_command_when_its_output_is_gone():
    """The line about a user error finds no reader: the exit code is still that of the error."""
    command = f"{sys.executable} -m aimv2_jax.main --config=nowhere.py --workdir=x"
    pipe = f"set -o pipefail; (exec {command}) 2>&1 | true"
    done = subprocess.run(["bash", "-c", pipe], cwd=ROOT, capture_output=True, timeout=60)
    assert done.returncode == 2
