"""Writes every experiment as it resolves, what ablations and chips change, and the list of decayed tensors, for review.

python -m tests.write_golden_configs
"""

import os

os.environ["JAX_PLATFORMS"] = "cpu"  # A TPU that is not there is not looked for.
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"

import jax

from aimv2_jax.config.load import config_text, load_config
from aimv2_jax.train.optimizer import decay_report
from aimv2_jax.train.task import run_key
from aimv2_jax.train.tasks import build_task
from tests.config.test_config import GOLDEN, QUICKSTART, experiments, golden_file
from tests.experiments import test_ablations, test_tpu
from tests.parallel.test_rules import table


def main() -> None:
    GOLDEN.mkdir(exist_ok=True)
    for experiment in experiments():
        golden_file(experiment).write_text(config_text(load_config(experiment)))
    task = build_task(load_config(QUICKSTART))
    (GOLDEN / "ablations.txt").write_text(test_ablations.summary())
    (GOLDEN / "chips.txt").write_text(test_tpu.summary())
    (GOLDEN / "shardings.txt").write_text(table("large"))
    (GOLDEN / "decay.txt").write_text(decay_report(jax.eval_shape(task.init, run_key(0))))


if __name__ == "__main__":
    main()
