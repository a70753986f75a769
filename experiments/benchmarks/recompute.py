"""Measures the cost of the silent data corruption check (`guard.sdc_check_every`) on this machine.

python experiments/benchmarks/recompute.py --every 1000 --json recompute.json

Plain and checked steps of the quickstart's model alternate. A checked step copies state and batch, computes the step a
second time, and compares all bits.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from aimv2_jax.cli import Parser, check_output, positive  # noqa: E402
from aimv2_jax.config.load import load_config  # noqa: E402
from aimv2_jax.config.schema import Config  # noqa: E402
from aimv2_jax.errors import EXIT_FINISHED, cli_main  # noqa: E402
from aimv2_jax.platforms import skip_absent_tpu  # noqa: E402

QUICKSTART = ROOT / "experiments/quickstart.py"


def measure(config: Config, rounds: int) -> tuple[list[float], list[float]]:
    """Returns the seconds of plain and of checked steps."""
    import jax

    from aimv2_jax.train.builder import build_setup
    from aimv2_jax.train.sdc_check import SdcCheck
    from experiments.benchmarks.step_time import synthetic_batch

    program = build_setup(config, jax.devices()[:1])
    [shape] = config.batch_shapes
    step, batch, state = program.compile_step(shape), synthetic_batch(program), program.init()
    sdc_check = SdcCheck(program, {shape: step}, rotate_devices=False)
    plain_s, checked_s = [], []
    for number in range(2 * rounds + 2):
        checked = number % 2
        jax.block_until_ready(state)
        begin_s = time.perf_counter()
        again = sdc_check.start(state, batch, shape) if checked else None
        state, metrics = step(state, batch, program.rng)
        if checked and (found := sdc_check.differences((state, metrics), again)):
            raise RuntimeError(f"a step that was computed twice differs: {found}")
        jax.block_until_ready((state, metrics))
        if number >= 2:  # The first step of each kind compiles and warms up.
            (checked_s if checked else plain_s).append(time.perf_counter() - begin_s)
    return plain_s, checked_s


@cli_main
def main(arguments: Sequence[str] | None = None) -> int:
    skip_absent_tpu()
    parser = Parser(
        prog="python experiments/benchmarks/recompute.py",
        description="Measures the cost of checking steps for data corruption.",
    )
    parser.add_argument("--every", type=positive, default=1000, help="steps between checks (default %(default)s)")
    parser.add_argument(
        "--rounds", type=positive, default=20, help="pairs of a plain and a checked step (default %(default)s)"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="where the report goes")
    flags = parser.parse_args(arguments)
    if flags.json:
        check_output(flags.json, flag="--json")
    plain_s, checked_s = measure(load_config(QUICKSTART), flags.rounds)
    extra = statistics.median(b / a for a, b in zip(plain_s, checked_s, strict=True)) - 1
    report = {
        "plain_step_s": statistics.median(plain_s),
        "checked_step_s": statistics.median(checked_s),
        "extra_steps": extra,  # Duration of one check in plain steps.
        "every": flags.every,
        "overhead": extra / flags.every,
        "rounds": flags.rounds,
    }
    if flags.json:
        flags.json.write_text(json.dumps(report, indent=1) + "\n")
    print(
        f"a checked step takes {1 + extra:.2f} times a plain step ({report['plain_step_s']:.3f} s): a check every "
        f"{flags.every:,} steps costs {100 * report['overhead']:.3f} % of the step time"
    )
    return EXIT_FINISHED


if __name__ == "__main__":
    sys.exit(main())
