"""Captioning: no image loss; the encoder has full (bidirectional) attention.

Published: 85.1 / 76.2 / 34.4.

python -m aimv2_jax.main --config=experiments/ablations/captioning_full.py --workdir=DIR
"""

from ml_collections import ConfigDict

from experiments.ablation import captioning_config


def get_config() -> ConfigDict:
    config = captioning_config()
    config.model.encoder.attention_mask = "full"
    return config
