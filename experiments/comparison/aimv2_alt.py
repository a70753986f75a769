"""The comparison run with alt-texts alone: synthetic captions contain the labels of the probe.

python -m aimv2_jax.main --config=experiments/comparison/aimv2_alt.py --workdir=runs/comparison/aimv2_alt
"""

from ml_collections import ConfigDict

from experiments.comparison import aimv2


def get_config() -> ConfigDict:
    config = aimv2.get_config()
    config.data.mixture = {"pairs": {"alt": 1.0}}
    return config
