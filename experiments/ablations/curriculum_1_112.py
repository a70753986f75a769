"""A curriculum of resolutions, first run: 80 % of the samples at 112 px; curriculum_2_224.py continues it.

python -m aimv2_jax.main --config=experiments/ablations/curriculum_1_112.py --workdir=DIR
"""

from ml_collections import ConfigDict

from experiments.ablation import small_stage_config


def get_config() -> ConfigDict:
    return small_stage_config()
