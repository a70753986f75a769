"""A decoder of width 1536; AIMv2 has 1024. Heads keep 128 channels.

Published: 85.1 / 76.9 / 36.9.

python -m aimv2_jax.main --config=experiments/ablations/decoder_width_1536.py --workdir=DIR
"""

from ml_collections import ConfigDict

from experiments.ablation import ablation_config


def get_config() -> ConfigDict:
    config = ablation_config()
    config.model.decoder.update(width=1536, heads=12)
    return config
