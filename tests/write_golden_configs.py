"""Writes every experiment as it resolves, what each ablation changes, and the list of decayed tensors, for review.

python -m tests.write_golden_configs
"""

import os
import sys
from pathlib import Path

os.environ["JAX_PLATFORMS"] = "cpu"  # A TPU that is not there is not looked for.
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"
sys.path.insert(0, str(Path(__file__).parent))

import jax
from parallel.test_rules import table
from test_ablations import summary

from aimv2_jax.config import config_text, load_config
from aimv2_jax.train.optimizer import decay_report
from aimv2_jax.train.task import build_task, run_key

ROOT = Path(__file__).parents[1]
GOLDEN = ROOT / "tests/golden_configs"


def main() -> None:
    GOLDEN.mkdir(exist_ok=True)
    for path in sorted((ROOT / "experiments").glob("*.py")):
        if "def get_config" in path.read_text() and path.stem != "base":
            (GOLDEN / f"{path.stem}.txt").write_text(config_text(load_config(path)))
    task = build_task(load_config(ROOT / "experiments/quickstart.py"))
    (GOLDEN / "ablations.txt").write_text(summary())
    (GOLDEN / "shardings.txt").write_text(table("pretrain_large_224"))
    (GOLDEN / "decay.txt").write_text(decay_report(jax.eval_shape(task.init, run_key(0))))


if __name__ == "__main__":
    main()
