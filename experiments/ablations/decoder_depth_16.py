"""A decoder of 16 blocks; AIMv2 has 12.

Published: 85.6 / 76.9 / 36.6.

python -m aimv2_jax.main --config=experiments/ablations/decoder_depth_16.py --workdir=DIR
"""

from ml_collections import ConfigDict

from experiments.ablation import ablation_config


def get_config() -> ConfigDict:
    config = ablation_config()
    config.model.decoder.depth = 16
    return config
