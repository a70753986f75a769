"""A decoder of 8 blocks; AIMv2 has 12.

Published: 85.5 / 76.7 / 37.0.

python -m aimv2_jax.main --config=experiments/ablations/decoder_depth_8.py --workdir=DIR
"""

from ml_collections import ConfigDict

from experiments.ablation import ablation_config


def get_config() -> ConfigDict:
    config = ablation_config()
    config.model.decoder.depth = 8
    return config
