"""AIMv2, the reference of all ablations: both losses, alpha 0.4, one decoder of width 1024 and depth 12.

Published: 85.6 / 76.9 / 37.5.

python -m aimv2_jax.main --config=experiments/ablations/aimv2.py --workdir=DIR
"""

from ml_collections import ConfigDict

from experiments.ablation import ablation_config


def get_config() -> ConfigDict:
    return ablation_config()
