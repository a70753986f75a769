"""Times train steps of several programs in turns, so that disturbances affect all equally; prints a table.

    python experiments/benchmarks/beside.py --json FILE
        --run "ours=PYTHON experiments/benchmarks/step_time.py --turns"
        --run "reference=PYTHON step_torch.py" ...

All programs are started in sequence and keep running: for every line on its stdin, a program times some steps and
prints their rate as a JSON line `{"images_per_s": N}`; the first is not counted. Each program gets `--threads` cores
and OMP_NUM_THREADS of that value.
"""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import statistics
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from aimv2_jax.cli import Parser, positive  # noqa: E402
from aimv2_jax.errors import EXIT_FINISHED, UserError, cli_main  # noqa: E402


class BenchmarkProcess:
    """A running benchmark program."""

    def __init__(self, name: str, command: str, threads: int):
        self.name = name
        cores = sorted(os.sched_getaffinity(0))[:threads]
        self.process = subprocess.Popen(
            shlex.split(command),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            bufsize=1,
            env={**os.environ, "OMP_NUM_THREADS": str(threads)},
        )
        # Set from here, before it starts threads: a preexec_fn would warn in a process with JAX's threads.
        os.sched_setaffinity(self.process.pid, cores)

    def rate(self) -> float:
        """Returns the images a second of its next steps."""
        with contextlib.suppress(BrokenPipeError):  # It has ended; the loop below reports it.
            self.process.stdin.write("\n")
        for line in self.process.stdout:
            with contextlib.suppress(ValueError, KeyError, TypeError):  # Other output.
                return float(json.loads(line)["images_per_s"])
        raise UserError(
            f"--run {self.name} ended", f"code {self.process.wait()}", "Run its command alone and read its output"
        )

    def end(self) -> None:
        """Kills the program."""
        self.process.kill()
        with contextlib.suppress(BrokenPipeError):  # An unread line.
            self.process.stdin.close()
        self.process.stdout.close()
        self.process.wait()


@contextlib.contextmanager
def started(commands: dict[str, str], threads: int) -> Iterator[list[BenchmarkProcess]]:
    """Starts and warms up all programs; kills them on exit."""
    programs = []
    try:
        for name, command in commands.items():
            programs.append(BenchmarkProcess(name, command, threads))
            programs[-1].rate()
        yield programs
    finally:
        for program in programs:
            program.end()


def table(rates: dict[str, list[float]]) -> str:
    """Returns a table of median, lowest and highest rate, and the ratio of the first program's median to each."""
    first = statistics.median(next(iter(rates.values())))
    lines = ["| program | images/s, median | lowest | highest | speed-up of the first |", "|---|---|---|---|---|"]
    for name, values in rates.items():
        median = statistics.median(values)
        lines.append(f"| {name} | {median:.2f} | {min(values):.2f} | {max(values):.2f} | {first / median:.2f} |")
    return "\n".join(lines)


@cli_main
def main(arguments: Sequence[str] | None = None) -> int:
    parser = Parser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "--run", action="append", required=True, metavar="NAME=COMMAND", help="a program; repeat the flag for each"
    )
    parser.add_argument(
        "--rounds", type=positive, default=5, help="turns of each program, of which the median is reported"
    )
    parser.add_argument("--threads", type=positive, default=2, help="threads of each program")
    parser.add_argument("--json", metavar="FILE", help="also write all rates to this file")
    flags = parser.parse_args(arguments)
    commands = dict(_named(text) for text in flags.run)
    rates: dict[str, list[float]] = {name: [] for name in commands}
    with started(commands, flags.threads) as programs:
        for _ in range(flags.rounds):
            for program in programs:
                rates[program.name].append(program.rate())
            print(", ".join(f"{name} {values[-1]:.2f}" for name, values in rates.items()), flush=True)
    print(table(rates))
    if flags.json:
        Path(flags.json).write_text(json.dumps({"threads": flags.threads, "images_per_s": rates}, indent=1) + "\n")
    return EXIT_FINISHED


def _named(text: str) -> tuple[str, str]:
    name, equals, command = text.partition("=")
    if not (name and equals and command):
        raise UserError("--run lacks a name or a command", text, "Give NAME=COMMAND")
    return name, command


if __name__ == "__main__":
    sys.exit(main())
