"""AIMv2-huge at 224 px.

python -m aimv2_jax.main --config=experiments/pretrain_huge_224.py --workdir=DIR
"""

from ml_collections import ConfigDict

from experiments.pretrain import pretrain_config


def get_config() -> ConfigDict:
    return pretrain_config("huge")
