"""What it costs to compute one step in so many twice (`guard.recompute_every`), on this machine.

python experiments/benchmarks/recompute.py --every 1000 --json recompute.json

Plain and checked steps of the quickstart's model take turns; a checked one copies state and batch, computes the step a
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

from aimv2_jax.config import Config, load_config  # noqa: E402
from aimv2_jax.errors import EXIT_FINISHED, reports_user_errors  # noqa: E402
from aimv2_jax.flags import Parser, check_output, positive  # noqa: E402
from aimv2_jax.platforms import skip_absent_tpu  # noqa: E402

QUICKSTART = ROOT / "experiments/quickstart.py"


def measure(config: Config, rounds: int) -> tuple[list[float], list[float]]:
    """Seconds of plain and of checked steps."""
    import jax

    from aimv2_jax.train.program import build_program
    from aimv2_jax.train.recompute import Recompute
    from experiments.benchmarks.step_time import synthetic_batch

    program = build_program(config, jax.devices()[:1])
    [shape] = config.batch_shapes
    step, batch, state = program.compile_step(shape), synthetic_batch(program), program.init()
    recompute = Recompute(program, {shape: step}, elsewhere=False)
    plain_s, checked_s = [], []
    for number in range(2 * rounds + 2):
        checked = number % 2
        jax.block_until_ready(state)
        begin_s = time.perf_counter()
        again = recompute.start(state, batch, shape) if checked else None
        state, metrics = step(state, batch, program.rng)
        if checked and (found := recompute.differences((state, metrics), again)):
            raise RuntimeError(f"a step that was computed twice differs: {found}")
        jax.block_until_ready((state, metrics))
        if number >= 2:  # The first of each kind compiles the comparison, and warms up.
            (checked_s if checked else plain_s).append(time.perf_counter() - begin_s)
    return plain_s, checked_s


@reports_user_errors
def main(arguments: Sequence[str] | None = None) -> int:
    skip_absent_tpu()
    parser = Parser(prog="python experiments/benchmarks/recompute.py", description="What computing steps twice costs.")
    parser.add_argument("--every", type=positive, default=1000, help="steps, one of them checked (default %(default)s)")
    parser.add_argument(
        "--rounds", type=positive, default=20, help="of a plain and a checked step (default %(default)s)"
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
        "extra_steps": extra,  # That one check takes as long as.
        "every": flags.every,
        "overhead": extra / flags.every,
        "rounds": flags.rounds,
    }
    if flags.json:
        flags.json.write_text(json.dumps(report, indent=1) + "\n")
    print(
        f"a checked step takes as long as {1 + extra:.2f} plain ones ({report['plain_step_s']:.3f} s): one of "
        f"{flags.every:,} costs {100 * report['overhead']:.3f} % of the time of all steps"
    )
    return EXIT_FINISHED


if __name__ == "__main__":
    sys.exit(main())
