"""The image loss weighs 0.2; in AIMv2 0.4.

Published: 85.6 / 76.7 / 37.4.

python -m aimv2_jax.main --config=experiments/ablations/alpha_0_2.py --workdir=DIR
"""

from ml_collections import ConfigDict

from experiments.ablation import ablation_config


def get_config() -> ConfigDict:
    config = ablation_config()
    config.loss.alpha = 0.2
    return config
