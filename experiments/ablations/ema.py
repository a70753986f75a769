"""AIMv2 with a moving average of its parameters, which is evaluated too and replaces them in export and probes.

A decay of 0.9999 averages over about 10,000 of the run's 244,141 steps. [O]

python -m aimv2_jax.main --config=experiments/ablations/ema.py --workdir=DIR
"""

from ml_collections import ConfigDict

from experiments.ablation import ablation_config


def get_config() -> ConfigDict:
    config = ablation_config()
    config.optimizer.ema_decay = 0.9999
    return config
