"""Simulates a run that fails again and again, and counts its goodput by the code that counts that of real runs.

python experiments/drills/goodput.py --json goodput.json --html goodput.html

A trainer with a clock of its own writes the books of a run as the loop does, without computing anything: it is killed
at random moments, once in so many steps on average, and goes on from the last checkpoint that was whole by then. Then
the books are read. What a save interval allows is that half an interval is lost at each failure; the drill fails where
the goodput, in steps or in time, is at 95 % of that or below, and where the books tell other steps than were simulated.
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

from aimv2_jax.errors import EXIT_FINISHED, reports_user_errors  # noqa: E402
from aimv2_jax.flags import Parser, check_output, positive  # noqa: E402
from aimv2_jax.platforms import skip_absent_tpu  # noqa: E402
from aimv2_jax.train.events import Events, Spending, read_events  # noqa: E402
from aimv2_jax.train.goodput import LOST, Story, tell  # noqa: E402

LEAST = 0.95  # Of what the save interval allows.
_EPOCH_S = 1_750_000_000.0


@dataclasses.dataclass(frozen=True)
class Run:
    """What is simulated. Times in seconds."""

    steps: int = 10_000
    mean_failure: float = 100.0  # Steps done between two failures; 0: none fails.
    save_every: int = 10
    log_every: int = 1
    eval_every: int = 1000
    step_s: float = 0.9
    data_s: float = 0.02  # That a step waits for its batch.
    save_s: float = 0.3  # That steps wait for a save ...
    commit_s: float = 1.5  # ... and until it is whole.
    evaluation_s: float = 40.0
    start_s: float = 45.0  # From a process' start to its first step.
    down_s: float = 20.0  # From a failure to the next process.


class Killed(Exception):
    """The simulated trainer is gone."""


class Clock:
    """Time that goes on by `spend` alone, and kills whoever spends beyond `until_s`."""

    def __init__(self):
        self.now_s, self.until_s = 0.0, float("inf")

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
    """What the simulation knows to have happened, and the books must tell."""

    done: int = 0
    failures: int = 0


def simulate(run: Run, workdir: Path, seed: int) -> Truth:
    """Writes the books of `run` to `workdir`."""
    chance, clock, truth = random.Random(seed), Clock(), Truth()
    saved: list[tuple[float, int]] = [(0.0, 0)]  # When each checkpoint was whole.
    while True:
        origin = max(step for _, step in saved)
        # At a random moment of a step, after so many: a start-up of which nothing comes would cost no steps.
        lasts = chance.expovariate(1 / run.mean_failure) if run.mean_failure else float("inf")
        try:
            _start(run, workdir, origin, lasts, clock, saved, truth)
            return truth
        except Killed:
            truth.failures += 1
            saved = [(whole_s, step) for whole_s, step in saved if whole_s <= clock.now_s]  # Others died with it.
            clock.until_s = float("inf")
            clock.spend(run.down_s)


def _start(
    run: Run, workdir: Path, origin: int, lasts: float, clock: Clock, saved: list[tuple[float, int]], truth: Truth
) -> None:
    """One start of the trainer, from the state after step `origin` to the end, or until it has done `lasts` steps."""
    begin_s = clock.now_s
    clock.spend(run.start_s * 0.2)
    with Events(workdir, age_s=clock.now_s - begin_s, clock=clock, wall=clock.wall) as events:
        events.write(
            "start", origin, processes=64, devices=256, device_kind="simulated", config="simulated", steps=run.steps,
            save_every=run.save_every, versions={},
        )  # fmt: skip
        if origin:
            clock.spend(run.start_s * 0.3)
            events.write("restore", origin, seconds=run.start_s * 0.3)
        clock.spend(run.start_s * (0.5 if origin else 0.8))
        events.write("compiled", origin, seconds=run.start_s * 0.5)
        spending = Spending(clock)
        for step in range(origin + 1, run.steps + 1):
            if step - origin > lasts:
                clock.until_s = clock.now_s + (lasts % 1) * (run.data_s + run.step_s)
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


def figures(story: Story, truth: Truth) -> dict[str, float | int | None]:
    """What the books tell, beside what was simulated."""
    allowed = story.allowed
    return {
        "starts": len(story.starts),
        "failures": story.failures,
        "failures_simulated": truth.failures,
        "steps_that_count": story.kept_steps,
        "steps_lost": story.lost_by_restarts,
        "steps_done_simulated": truth.done,
        "steps_goodput": story.steps_goodput,
        "steps_allowed": None if allowed is None else allowed.steps,
        "steps_reached": None if allowed is None else allowed.reached_steps,
        "goodput": story.goodput,
        "goodput_allowed": None if allowed is None else allowed.time,
        "goodput_reached": None if allowed is None else allowed.reached_time,
        "hours": story.total_s / 3600,
        "hours_lost": story.seconds[LOST] / 3600,
    }


def faults(found: dict[str, float | int | None], log_every: int) -> list[str]:
    """What is not as it must be."""
    wrong = []
    unseen = found["steps_done_simulated"] - found["steps_that_count"] - found["steps_lost"]
    if not 0 <= unseen <= found["failures_simulated"] * (log_every - 1):
        wrong.append(f"{unseen} simulated steps are in no book")
    wrong += [
        f"{name} is {found[name]:.4f}, not above {LEAST}"
        for name in ("steps_reached", "goodput_reached")
        if found[name] is not None and found[name] <= LEAST
    ]
    return wrong


@reports_user_errors
def main(arguments: Sequence[str] | None = None) -> int:
    skip_absent_tpu()
    summary, _, epilog = __doc__.partition("\n\n")
    parser = Parser(prog="python experiments/drills/goodput.py", description=summary, epilog=epilog)
    add = parser.add_argument
    add("--steps", type=positive, default=Run.steps, metavar="N", help="of the run (default %(default)s)")
    add("--failure-every", type=positive, default=100, metavar="N", help="steps, on average (default %(default)s)")
    add("--save-every", type=positive, default=Run.save_every, metavar="N", help="steps (default %(default)s)")
    add("--log-every", type=positive, default=Run.log_every, metavar="N", help="steps (default %(default)s)")
    add("--seed", type=int, default=0, metavar="N", help="of the failures (default %(default)s)")
    add("--json", type=Path, metavar="FILE", help="the figures")
    add("--html", type=Path, metavar="FILE.html", help="the page of the simulated run")
    flags = parser.parse_args(sys.argv[1:] if arguments is None else arguments)
    for path, flag, suffix in ((flags.json, "--json", ""), (flags.html, "--html", ".html")):
        if path is not None:
            check_output(path, suffix, flag)
    return _drill(flags)


def _drill(flags: argparse.Namespace) -> int:
    from aimv2_jax.train.report import summary
    from aimv2_jax.train.report_facts import gather
    from aimv2_jax.train.report_page import page

    run = Run(flags.steps, flags.failure_every, flags.save_every, flags.log_every)
    with tempfile.TemporaryDirectory(prefix="goodput-") as folder:
        workdir = Path(folder) / "simulated"
        truth = simulate(run, workdir, flags.seed)
        found = figures(tell(read_events(workdir)), truth)
        told = gather(workdir)
        print(summary(told, most_starts=8, most_events=4))
        if flags.html is not None:
            flags.html.write_text(page(told), encoding="utf-8")
    print(json.dumps(found, indent=1))
    if flags.json is not None:
        flags.json.write_text(json.dumps(dataclasses.asdict(run) | found, indent=1) + "\n", encoding="utf-8")
    wrong = faults(found, run.log_every)
    print("\n".join(f"FAILED: {line}" for line in wrong) or "passed")
    return 1 if wrong else EXIT_FINISHED


if __name__ == "__main__":
    sys.exit(main())
