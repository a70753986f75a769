"""Kills a small run at random moments, resumes it, and compares the result with an undisturbed run.

python tests/stress/kill.py --kills 20 --json kill.json

Each kill sends SIGKILL to the trainer at a random moment. Of four kills in a row:

- two come during training, evaluation and saves, the first of all while the compilation cache is empty;
- one comes when a save has just begun;
- one comes at about start-up: during imports, restore, the load of compiled programs or the first reads.

After each kill, no process of the trainer may remain. At most the steps between two saves may be lost, plus those
during a save in progress. At the end, parameters, optimiser state and metrics must equal those of the undisturbed run
bit for bit.
"""

from __future__ import annotations

import dataclasses
import json
import random
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from aimv2_jax.cli import Parser, check_output, positive  # noqa: E402
from aimv2_jax.errors import EXIT_FINISHED, cli_main  # noqa: E402
from aimv2_jax.platforms import skip_absent_tpu  # noqa: E402
from tests.stress.trainer import (  # noqa: E402
    EXIT_TERMINATED,
    SAVE_EVERY,
    TIMEOUT_S,
    Trainer,
    count_lines,
    last_step,
    saved_steps,
    small_config,
    start_step,
)

# Delays of each step and of each commit of a save. Without them, dozens of steps would run during a save.
_STEP_DELAY_S, _SAVE_DELAY_S = 0.03, 0.1
_TRAIN_S = 2.0  # Maximum delay of a kill in training: about two intervals between saves.
WHEN = ("training", "saving", "starting", "training")
_ENDLESS = 10**6
_FINAL_STEPS = 20  # Undisturbed steps after the last kill.
# Metrics that depend on timing, and so differ between runs.
_TIMED = ("images_per_s", "step_time_s", "data_wait_fraction", "data_queue_depth", "mfu", "model_tflops_per_s")
_TIMED += ("save_stall_s", "data_read_retries", "storage_retries")


@dataclasses.dataclass(frozen=True)
class Kill:
    """A kill and its effects.

    Attributes:
      when: one of `WHEN`.
      after_s: seconds from the trainer's start.
      step: last step in the metrics.
      saved: newest committed step, from which the run resumes.
      saving: a later step whose save was in progress, if any.
      lost: steps that this start logged and the next start repeats.
      processes: number of the trainer's processes before the kill.
      gone_after_s: seconds from the kill until all of them were gone.
      started_s: seconds from the trainer's start until its first step was in the metrics, if it got that far.
    """

    when: str
    after_s: float
    step: int
    saved: int
    saving: int | None
    lost: int
    processes: int
    gone_after_s: float
    started_s: float | None

    def check(self, save_every: int) -> None:
        """Raises AssertionError if too many steps were lost."""
        # Until a save is committed, the previous checkpoint is the newest, and the next save waits.
        due = self.saved + save_every
        assert self.lost <= save_every or (self.saving == due and self.lost <= 2 * save_every), f"too much lost: {self}"


def kill_once(workdir: Path, generator: random.Random, when: str, start_s: float) -> Kill:
    """Starts the trainer, kills it in the phase `when` (of `WHEN`), and waits until its processes are gone.

    `start_s` is about the duration of a start-up.
    """
    begin_s, started_s = time.monotonic(), None
    before = last_step(workdir)
    first_line = count_lines(workdir)
    newest, _ = saved_steps(workdir, first_line)
    with Trainer(workdir, _STEP_DELAY_S, _SAVE_DELAY_S, train__steps=_ENDLESS) as trainer:
        if when == "starting":
            time.sleep(generator.uniform(0, 1.5 * start_s))
        else:
            _wait_for(lambda: last_step(workdir) > before, trainer)
            started_s = round(time.monotonic() - begin_s, 2)
            if when == "training":
                time.sleep(generator.uniform(0, _TRAIN_S))
        processes = len(trainer.resources())
        if when == "saving":
            # After a committed step, so that the next start has something to go on from.
            _wait_for(lambda: all(saved_steps(workdir, first_line)), trainer)
            time.sleep(generator.uniform(0, _SAVE_DELAY_S))
        trainer.check_running()
        trainer.process.send_signal(signal.SIGKILL)
        trainer.process.wait()
        after_s = time.monotonic() - begin_s
        gone_after_s = trainer.wait_until_gone()
    begun = start_step(workdir, first_line)
    assert begun in (None, newest), f"the run resumed from step {begun} instead of step {newest}"
    step, (saved, saving) = last_step(workdir), saved_steps(workdir, first_line)
    # Metrics beyond the newest checkpoint remain until the next start truncates them. If this start logged no step,
    # they are from the previous start, whose lost steps are already counted.
    lost = 0 if step == before else max(0, step - saved)
    return Kill(when, round(after_s, 2), step, saved, saving, lost, processes, round(gone_after_s, 2), started_s)


def _wait_for(condition: Callable[[], bool], trainer: Trainer) -> None:
    start = time.monotonic()
    while not condition():
        trainer.check_running()
        if time.monotonic() - start > TIMEOUT_S:
            raise RuntimeError(f"the expected state was not reached within {TIMEOUT_S:.0f} s:\n{trainer.log_tail()}")
        time.sleep(0.02)


def compare(workdir: Path | str, undisturbed: Path, steps: int) -> int:
    """Returns the number of values in the state; raises AssertionError unless states and metrics are bitwise equal."""
    import jax
    import numpy as np

    from aimv2_jax.checkpoint.checkpointer import CheckpointReader
    from aimv2_jax.monitoring.metrics import read_metrics
    from aimv2_jax.train.builder import build_setup

    setup = build_setup(small_config())
    killed_leaves, undisturbed_leaves = (
        jax.tree.leaves(jax.device_get(CheckpointReader(path).restore(steps, setup.abstract_state)))
        for path in (workdir, undisturbed)
    )
    assert all(
        a.dtype == b.dtype and np.array_equal(a, b) for a, b in zip(killed_leaves, undisturbed_leaves, strict=True)
    ), "states differ"
    lines = [
        [[{k: v for k, v in line.items() if k not in _TIMED} for line in part] for part in read_metrics(path)]
        for path in (workdir, undisturbed)
    ]
    assert [line["step"] for line in lines[0][0]] == list(range(1, steps + 1)), "a step is missing or duplicated"
    assert lines[0] == lines[1], "metrics differ"
    return sum(leaf.size for leaf in killed_leaves)


def drill(kills: int, seed: int, folder: Path) -> dict[str, object]:
    """Kills a run `kills` times and returns a report; raises AssertionError or RuntimeError if a check fails."""
    generator, done = random.Random(seed), []
    workdir, undisturbed = folder / "killed", folder / "undisturbed"
    workdir.mkdir()
    undisturbed.mkdir()
    start_s = 0.0
    for number in range(kills):
        done.append(kill_once(workdir, generator, WHEN[number % 4], start_s))
        start_s = done[-1].started_s or start_s
        print(f"kill {number + 1}/{kills}: {done[-1]}", flush=True)
        done[-1].check(SAVE_EVERY)
    steps = last_step(workdir) + _FINAL_STEPS
    for path in (workdir, undisturbed):
        with Trainer(path, train__steps=steps) as trainer:
            trainer.finish()
    return {
        "kills": [dataclasses.asdict(kill) for kill in done],
        "while_saving": sum(kill.saving is not None for kill in done),
        "most_lost": max(kill.lost for kill in done),
        "steps": steps,
        "numbers_compared": compare(workdir, undisturbed, steps),
    }


@cli_main
def main(arguments: Sequence[str] | None = None) -> int:
    skip_absent_tpu()
    parser = Parser(
        prog="python tests/stress/kill.py",
        description="Kills a run at random moments and checks the resumed result.",
    )
    parser.add_argument("--kills", type=positive, default=20, help="number of kills (default %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the random moments (default %(default)s)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="file for the report")
    flags = parser.parse_args(arguments)
    if flags.json:
        check_output(flags.json, flag="--json")
    # SystemExit unwinds the stack, so that the trainer is stopped too.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(EXIT_TERMINATED))
    with tempfile.TemporaryDirectory(prefix="drill-") as folder:
        report = drill(flags.kills, flags.seed, Path(folder))
    if flags.json:
        flags.json.write_text(json.dumps(report, indent=1) + "\n")
    print(
        f"{flags.kills} kills, {report['while_saving']} of them during a save; {report['steps']} steps; at most "
        f"{report['most_lost']} lost at once, with a save every {SAVE_EVERY}; all {report['numbers_compared']:,} "
        "values of the state and all metrics equal those of the undisturbed run"
    )
    return EXIT_FINISHED


if __name__ == "__main__":
    sys.exit(main())
