"""Simulates a run with repeated failures, and computes its goodput with the code for real runs.

python tests/stress/goodput.py --json goodput.json --html goodput.html

A simulated trainer with its own clock writes a run's event log like the real loop, without computation. It is killed at
random moments, at a given mean interval in steps, and resumes from the last committed checkpoint. Then goodput is
computed from the log. A save interval allows the loss of half an interval at each failure; the drill fails if the
goodput, in steps or in time, is at or below 95 % of that, or if the log and the simulation differ in steps.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import random
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from aimv2_jax.cli import Parser, check_output, positive  # noqa: E402
from aimv2_jax.errors import EXIT_FINISHED, cli_main  # noqa: E402
from aimv2_jax.monitoring.events import EventLog, TimeAccounting, read_events  # noqa: E402
from aimv2_jax.monitoring.goodput import LOST, GoodputReport, compute_goodput  # noqa: E402
from aimv2_jax.platforms import skip_absent_tpu  # noqa: E402

MIN_FRACTION = 0.95  # Required fraction of the goodput that the save interval allows.
_EPOCH_S = 1_750_000_000.0


@dataclasses.dataclass(frozen=True)
class SimulatedRun:
    """Parameters of a simulated run. Times are in seconds."""

    steps: int = 10_000
    mean_failure: float = 100.0  # Mean steps between failures; 0: no failures.
    save_every: int = 10
    log_every: int = 1
    eval_every: int = 1000
    step_s: float = 0.9
    data_s: float = 0.02  # Wait for a batch in each step.
    save_s: float = 0.3  # Time that a save blocks the loop.
    commit_s: float = 1.5  # Time from then until the save is committed.
    evaluation_s: float = 40.0
    start_s: float = 45.0  # From a process' start to its first step.
    down_s: float = 20.0  # From a failure to the next process.


class Killed(Exception):
    """The simulated trainer was killed."""


class Clock:
    """Simulated clock that `spend` advances; it raises `Killed` at `until_s`."""

    def __init__(self):
        self.now_s = 0.0
        self.until_s = float("inf")

    def __call__(self) -> float:
        return self.now_s

    def wall(self) -> float:
        return _EPOCH_S + self.now_s

    def spend(self, seconds: float) -> None:
        if self.now_s + seconds >= self.until_s:
            self.now_s = self.until_s
            raise Killed
        self.now_s += seconds


@dataclasses.dataclass
class Truth:
    """Ground truth of the simulation, to compare with the event log."""

    done: int = 0
    failures: int = 0


def simulate(run: SimulatedRun, workdir: Path, seed: int) -> Truth:
    """Writes the event log of `run` to `workdir`."""
    rng = random.Random(seed)
    clock = Clock()
    truth = Truth()
    saved: list[tuple[float, int]] = [(0.0, 0)]  # Commit time and step of each checkpoint.
    while True:
        origin = max(step for _, step in saved)
        # The failure comes within a step, not during start-up, where it would cost no steps.
        steps_to_failure = rng.expovariate(1 / run.mean_failure) if run.mean_failure else float("inf")
        try:
            _start(run, workdir, origin, steps_to_failure, clock, saved, truth)
            return truth
        except Killed:
            truth.failures += 1
            # Uncommitted saves are lost.
            saved = [(commit_s, step) for commit_s, step in saved if commit_s <= clock.now_s]
            clock.until_s = float("inf")
            clock.spend(run.down_s)


def _start(
    run: SimulatedRun,
    workdir: Path,
    origin: int,
    steps_to_failure: float,
    clock: Clock,
    saved: list[tuple[float, int]],
    truth: Truth,
) -> None:
    """Simulates one start, from the state after step `origin` to the end or for `steps_to_failure` steps."""
    begin_s = clock.now_s
    clock.spend(run.start_s * 0.2)
    with EventLog(workdir, age_s=clock.now_s - begin_s, clock=clock, wall=clock.wall) as events:
        events.write(
            "start", origin, processes=64, devices=256, device_kind="simulated", config="simulated", steps=run.steps,
            save_every=run.save_every, versions={},
        )  # fmt: skip
        if origin:
            clock.spend(run.start_s * 0.3)
            events.write("restore", origin, seconds=run.start_s * 0.3)
        clock.spend(run.start_s * (0.5 if origin else 0.8))
        events.write("compiled", origin, seconds=run.start_s * 0.5)
        spending = TimeAccounting(clock)
        for step in range(origin + 1, run.steps + 1):
            if step - origin > steps_to_failure:
                clock.until_s = clock.now_s + (steps_to_failure % 1) * (run.data_s + run.step_s)
            with spending.on("data"):
                clock.spend(run.data_s)
            clock.spend(run.step_s)
            truth.done += 1
            last = step == run.steps
            if step % run.log_every == 0 or last:
                events.write("progress", step, **spending.seconds())
            if step % run.eval_every == 0 or last:
                with spending.on("evaluation"):
                    clock.spend(run.evaluation_s)
                events.write("evaluation", step, seconds=run.evaluation_s, eval_loss=None)
            if step % run.save_every == 0 or last:
                with spending.on("saving"):
                    clock.spend(run.save_s)
                saved.append((clock.now_s + run.commit_s, step))
                events.write("save", step, seconds=run.save_s)
        events.write("stop", run.steps, code=EXIT_FINISHED, why="")


def figures(report: GoodputReport, truth: Truth) -> dict[str, float | int | None]:
    """Returns the figures from the event log and from the simulation."""
    allowed = report.expected
    return {
        "starts": len(report.starts),
        "failures": report.failures,
        "failures_simulated": truth.failures,
        "steps_that_count": report.kept_steps,
        "steps_lost": report.lost_by_restarts,
        "steps_done_simulated": truth.done,
        "steps_goodput": report.steps_goodput,
        "steps_allowed": None if allowed is None else allowed.steps,
        "steps_reached": None if allowed is None else allowed.reached_steps,
        "goodput": report.goodput,
        "goodput_allowed": None if allowed is None else allowed.time,
        "goodput_reached": None if allowed is None else allowed.reached_time,
        "hours": report.total_s / 3600,
        "hours_lost": report.seconds[LOST] / 3600,
    }


def find_failures(measured: dict[str, float | int | None], log_every: int) -> list[str]:
    """Returns the failed checks."""
    failures = []
    unseen = measured["steps_done_simulated"] - measured["steps_that_count"] - measured["steps_lost"]
    if not 0 <= unseen <= measured["failures_simulated"] * (log_every - 1):
        failures.append(f"{unseen} simulated steps are missing in the event log")
    failures += [
        f"{name} is {measured[name]:.4f}, not above {MIN_FRACTION}"
        for name in ("steps_reached", "goodput_reached")
        if measured[name] is not None and measured[name] <= MIN_FRACTION
    ]
    return failures


@cli_main
def main(arguments: Sequence[str] | None = None) -> int:
    skip_absent_tpu()
    summary, _, epilog = __doc__.partition("\n\n")
    parser = Parser(prog="python tests/stress/goodput.py", description=summary, epilog=epilog)
    add = parser.add_argument
    add("--steps", type=positive, default=SimulatedRun.steps, metavar="N", help="number of steps (default %(default)s)")
    add(
        "--failure-every",
        type=positive,
        default=100,
        metavar="N",
        help="mean steps between failures (default %(default)s)",
    )
    add(
        "--save-every",
        type=positive,
        default=SimulatedRun.save_every,
        metavar="N",
        help="steps between saves (default %(default)s)",
    )
    add(
        "--log-every",
        type=positive,
        default=SimulatedRun.log_every,
        metavar="N",
        help="steps between log lines (default %(default)s)",
    )
    add("--seed", type=int, default=0, metavar="N", help="seed of the failures (default %(default)s)")
    add("--json", type=Path, metavar="FILE", help="where the figures go")
    add("--html", type=Path, metavar="FILE.html", help="where the report page of the simulated run goes")
    flags = parser.parse_args(sys.argv[1:] if arguments is None else arguments)
    for path, flag, suffix in ((flags.json, "--json", ""), (flags.html, "--html", ".html")):
        if path is not None:
            check_output(path, suffix, flag)
    return _drill(flags)


def _drill(flags: argparse.Namespace) -> int:
    from aimv2_jax.monitoring.report import gather, page, summary

    run = SimulatedRun(flags.steps, flags.failure_every, flags.save_every, flags.log_every)
    with tempfile.TemporaryDirectory(prefix="goodput-") as folder:
        workdir = Path(folder) / "simulated"
        truth = simulate(run, workdir, flags.seed)
        measured = figures(compute_goodput(read_events(workdir)), truth)
        facts = gather(workdir)
        print(summary(facts, max_rows=8))
        if flags.html is not None:
            flags.html.write_text(page(facts), encoding="utf-8")
    print(json.dumps(measured, indent=1))
    if flags.json is not None:
        flags.json.write_text(json.dumps(dataclasses.asdict(run) | measured, indent=1) + "\n", encoding="utf-8")
    failures = find_failures(measured, run.log_every)
    print("\n".join(f"FAILED: {line}" for line in failures) or "passed")
    return 1 if failures else EXIT_FINISHED


if __name__ == "__main__":
    sys.exit(main())
