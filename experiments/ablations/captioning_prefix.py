"""Captioning: no image loss; the encoder has prefix attention.

Published: 85.4 / 76.8 / 36.5.

python -m aimv2_jax.main --config=experiments/ablations/captioning_prefix.py --workdir=DIR
"""

from ml_collections import ConfigDict

from experiments.ablation import captioning_config


def get_config() -> ConfigDict:
    return captioning_config()
