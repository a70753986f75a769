"""Writes the resolved text of every experiment, and the list of decayed tensors, for review.

    python -m tests.write_golden_configs
"""

from pathlib import Path

import jax

from aimv2_jax.config import config_text, load_config
from aimv2_jax.train.optimizer import decay_report
from aimv2_jax.train.task import build_task, run_key

ROOT = Path(__file__).parents[1]
GOLDEN = ROOT / "tests/golden_configs"


def main() -> None:
    GOLDEN.mkdir(exist_ok=True)
    for path in sorted((ROOT / "experiments").glob("*.py")):
        if "get_config" in path.read_text() and path.stem != "base":
            (GOLDEN / f"{path.stem}.txt").write_text(config_text(load_config(path)))
    task = build_task(load_config(ROOT / "experiments/quickstart.py"))
    (GOLDEN / "decay.txt").write_text(decay_report(jax.eval_shape(task.init, run_key(0))))


if __name__ == "__main__":
    main()
