"""One decoder for the image and one for the text, both on the encoder's features; AIMv2 has one for both.

Each has the width and depth of the joint one, and its own projection of the features. [O: the paper
does not specify them]

Published: 85.6 / 77.1 / 37.2.

python -m aimv2_jax.main --config=experiments/ablations/separate_decoders.py --workdir=DIR
"""

from ml_collections import ConfigDict

from experiments.ablation import ablation_config


def get_config() -> ConfigDict:
    config = ablation_config()
    config.model.decoder.kind = "separate"
    return config
