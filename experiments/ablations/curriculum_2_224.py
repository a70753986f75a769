"""A curriculum of resolutions, second run: the other 20 % of the samples at 224 px, from the parameters of the first.

The position table of 8 x 8 patches is interpolated to 16 x 16.

python -m aimv2_jax.main --config=experiments/ablations/curriculum_2_224.py --workdir=DIR \
  --config.init.path=DIR_OF_CURRICULUM_1
"""

from ml_collections import ConfigDict

from experiments.ablation import large_stage_config


def get_config() -> ConfigDict:
    return large_stage_config()
