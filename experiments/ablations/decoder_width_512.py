"""A decoder of width 512; AIMv2 has 1024. Heads keep 128 channels.

Published: 85.3 / 76.2 / 35.9.

python -m aimv2_jax.main --config=experiments/ablations/decoder_width_512.py --workdir=DIR
"""

from ml_collections import ConfigDict

from experiments.ablation import ablation_config


def get_config() -> ConfigDict:
    config = ablation_config()
    config.model.decoder.update(width=512, heads=4)
    return config
