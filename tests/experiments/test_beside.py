"""Interleaved benchmarks: the printed table of rates, and the error if a program ends."""

from __future__ import annotations

import json
import shlex
import sys

from aimv2_jax.errors import EXIT_USER
from experiments.benchmarks.beside import main

# Answers each line with the next rate; the first one is the warm-up.
PROGRAM = """
import os, sys
print("loading")
for rate in {rates}:
    sys.stdin.readline()
    print('{{"images_per_s": %s}}' % rate, flush=True)
print(os.environ["OMP_NUM_THREADS"], len(os.sched_getaffinity(0)), file=open({seen!r}, "w"))
"""


def run_of(name: str, rates: list[float], seen: str = "/dev/null") -> str:
    return f"--run={name}={shlex.join([sys.executable, '-c', PROGRAM.format(rates=rates, seen=seen)])}"


def test_table_when_two_take_turns_then_medians_and_ratio(tmp_path, capsys):
    runs = [run_of("ours", [1, 6, 30, 9]), run_of("theirs", [1, 4, 5, 3])]
    assert main([*runs, "--rounds", "3", "--json", str(tmp_path / "rates.json")]) == 0
    out = capsys.readouterr().out
    assert "ours 6.00, theirs 4.00\nours 30.00, theirs 5.00\n" in out
    assert "| ours | 9.00 | 6.00 | 30.00 | 1.00 |\n| theirs | 4.00 | 3.00 | 5.00 | 2.25 |" in out
    assert json.loads((tmp_path / "rates.json").read_text())["images_per_s"]["ours"] == [6, 30, 9]


def test_threads_when_given_then_cores_and_variable(tmp_path):
    seen = tmp_path / "seen"
    assert main([run_of("ours", [1], str(seen)), "--rounds", "1", "--threads", "1"]) == EXIT_USER
    assert seen.read_text() == "1 1\n"


def test_program_when_it_ends_then_named(capsys):
    assert main([run_of("theirs", [1, 2]), "--rounds", "3"]) == EXIT_USER
    assert "--run theirs ended" in capsys.readouterr().err
