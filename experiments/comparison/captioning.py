"""The comparison run without an image loss: captions alone, under prefix attention.

python -m aimv2_jax.main --config=experiments/comparison/captioning.py --workdir=runs/comparison/captioning
"""

from ml_collections import ConfigDict

from experiments.comparison import aimv2


def get_config() -> ConfigDict:
    config = aimv2.get_config()
    config.loss.image = False
    return config
