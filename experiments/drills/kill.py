"""Kills a small run at random moments, goes on with it, and compares what comes out with a run that was left alone.

python experiments/drills/kill.py --kills 20 --json kill.json

Each kill is a SIGKILL to the trainer, at a random moment: one of four comes on the way to the first step and a little
later, while it imports, restores, compiles or reads; two come while it trains, evaluates and saves; and one when a save
has just begun. After each of them no process of it, no shared memory and no semaphore may be left, and no more steps be
lost than lie between two saves, and those that were done while the newest was being written. After the last, its
parameters, its optimiser's state and its metrics must be those of the other run, bit for bit.
"""

from __future__ import annotations

import dataclasses
import json
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from aimv2_jax.errors import EXIT_FINISHED, reports_user_errors  # noqa: E402
from aimv2_jax.flags import Parser, check_output, positive  # noqa: E402
from aimv2_jax.platforms import skip_absent_tpu  # noqa: E402
from experiments.drills.trainer import (  # noqa: E402
    ENDS_S,
    EXIT_TERMINATED,
    SAVE_EVERY,
    Trainer,
    count_lines,
    last_step,
    small_config,
    start_step,
    steps_in,
)

# That each step, and each save before it counts, takes longer: without it, dozens of steps are done during a save.
_STEP_S, _SAVE_S = 0.03, 0.1
_TRAIN_S = 2.0  # About two intervals between saves.
WHEN = ("starting", "training", "saving", "training")
_ENDLESS = 10**6
_MORE_STEPS = 20  # That the run takes in peace after the last kill.
_TIMED = ("images_per_s", "step_time_s", "data_wait_fraction", "data_queue_depth", "mfu", "model_tflops_per_s")
_TIMED += ("save_stall_s",)


@dataclasses.dataclass(frozen=True)
class Kill:
    """A kill, and what it met.

    Attributes:
      when: one of `WHEN`.
      after_s: seconds from the trainer's start.
      step: the last one in the metrics.
      saved: the newest step that was saved whole; the run goes on from it.
      saving: a later one whose save had begun, if any.
      lost: steps that this start had done and the next does again.
      met: how many processes were there, and ...
      shared: ... segments and semaphores.
      gone_after_s: seconds until they were gone.
    """

    when: str
    after_s: float
    step: int
    saved: int
    saving: int | None
    lost: int
    met: int
    shared: int
    gone_after_s: float

    def check(self, save_every: int) -> None:
        """Raises AssertionError where more was lost than may be."""
        # A step that is being written counts from its commit on: until then the one before it is the newest, and the
        # next save waits.
        due = self.saved + save_every
        assert self.lost <= save_every or (self.saving == due and self.lost <= 2 * save_every), f"too much lost: {self}"


def kill_once(workdir: Path, moments: random.Random, when: str, start_s: float) -> Kill:
    """Starts the trainer, kills it at such a moment (`WHEN`), and waits until nothing of it is left."""
    begin_s, before, told = time.monotonic(), last_step(workdir), count_lines(workdir)
    newest, _ = steps_in(workdir, told)
    with Trainer(workdir, _STEP_S, _SAVE_S, train__steps=_ENDLESS) as trainer:
        if when == "starting":
            time.sleep(moments.uniform(0, 1.5 * start_s))
        else:
            _wait_for(lambda: last_step(workdir) > before, trainer)
            if when == "training":
                time.sleep(moments.uniform(0, _TRAIN_S))
        left = trainer.left()
        if when == "saving":
            _wait_for(lambda: steps_in(workdir, told)[1] is not None, trainer)
            time.sleep(moments.uniform(0, _SAVE_S))
        trainer.check_running()
        trainer.process.send_signal(signal.SIGKILL)
        trainer.process.wait()
        after_s = time.monotonic() - begin_s
        gone_after_s = trainer.wait_until_gone()
    begun = start_step(workdir, told)
    assert begun in (None, newest), f"it went on from step {begun}, and step {newest} was there"
    step, (saved, saving) = last_step(workdir), steps_in(workdir, told)
    met = sum(name.startswith("process ") for name in left)
    # Metrics beyond the newest checkpoint stand until the next start cuts them: of a start that had come to no step
    # they are those of the one before, whose steps are counted already.
    lost = 0 if step == before else max(0, step - saved)
    return Kill(when, round(after_s, 2), step, saved, saving, lost, met, len(left) - met, round(gone_after_s, 2))


def _wait_for(condition: Callable[[], bool], trainer: Trainer) -> None:
    start = time.monotonic()
    while not condition():
        trainer.check_running()
        if time.monotonic() - start > ENDS_S:
            raise RuntimeError(f"what should come has not come within {ENDS_S:.0f} s:\n{trainer.said()}")
        time.sleep(0.02)


def start_up_s(folder: Path) -> float:
    """How long a trainer takes until its first step is in the metrics, when all is compiled."""
    workdir = folder / "first"
    for _ in range(2):
        shutil.rmtree(workdir, ignore_errors=True)
        workdir.mkdir()
        start = time.monotonic()
        with Trainer(workdir, train__steps=_ENDLESS) as trainer:
            _wait_for(lambda: last_step(workdir) > 0, trainer)
    return time.monotonic() - start


def compare(workdir: Path, straight: Path, steps: int) -> int:
    """Numbers of the state; raises AssertionError unless it and the metrics of both runs are the same bit for bit."""
    import jax
    import numpy as np

    from aimv2_jax.train.checkpoint import CheckpointReader
    from aimv2_jax.train.metrics import read_metrics
    from aimv2_jax.train.program import build_program

    program = build_program(small_config())
    one, other = (
        jax.tree.leaves(jax.device_get(CheckpointReader(path).restore(steps, program.abstract_state)))
        for path in (workdir, straight)
    )
    assert all(a.dtype == b.dtype and np.array_equal(a, b) for a, b in zip(one, other, strict=True)), "states differ"
    lines = [
        [[{k: v for k, v in line.items() if k not in _TIMED} for line in part] for part in read_metrics(path)]
        for path in (workdir, straight)
    ]
    assert [line["step"] for line in lines[0][0]] == list(range(1, steps + 1)), "a step is missing, or stands twice"
    assert lines[0] == lines[1], "metrics differ"
    return sum(leaf.size for leaf in one)


def drill(kills: int, seed: int, folder: Path) -> dict[str, object]:
    """The report; raises AssertionError or RuntimeError where anything is not as it should be."""
    moments, done = random.Random(seed), []
    workdir, straight = folder / "killed", folder / "straight"
    workdir.mkdir(), straight.mkdir()
    start_s = start_up_s(folder)
    for number in range(1, kills + 1):
        done.append(kill_once(workdir, moments, WHEN[number % 4], start_s))
        print(f"kill {number}/{kills}: {done[-1]}", flush=True)
        done[-1].check(SAVE_EVERY)
    steps = last_step(workdir) + _MORE_STEPS
    for path in (workdir, straight):
        with Trainer(path, train__steps=steps) as trainer:
            trainer.finish()
    return {
        "kills": [dataclasses.asdict(kill) for kill in done],
        "while_saving": sum(kill.saving is not None for kill in done),
        "most_lost": max(kill.lost for kill in done),
        "steps": steps,
        "numbers_compared": compare(workdir, straight, steps),
    }


@reports_user_errors
def main(arguments: Sequence[str] | None = None) -> int:
    skip_absent_tpu()
    parser = Parser(prog="python experiments/drills/kill.py", description="Kills a run at random moments.")
    parser.add_argument("--kills", type=positive, default=20, help="how often (default %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the moments (default %(default)s)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="where the report goes")
    flags = parser.parse_args(arguments)
    if flags.json:
        check_output(flags.json, flag="--json")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(EXIT_TERMINATED))  # So that no trainer is left behind.
    with tempfile.TemporaryDirectory(prefix="drill-") as folder:
        report = drill(flags.kills, flags.seed, Path(folder))
    if flags.json:
        flags.json.write_text(json.dumps(report, indent=1) + "\n")
    print(
        f"{flags.kills} kills, {report['while_saving']} of them while a step was being written; {report['steps']} "
        f"steps; at most {report['most_lost']} lost at once, with a save every {SAVE_EVERY}; all "
        f"{report['numbers_compared']:,} numbers of the state and all metrics are those of the run that was left alone"
    )
    return EXIT_FINISHED


if __name__ == "__main__":
    sys.exit(main())
