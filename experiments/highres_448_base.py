"""AIMv2-base at 448 px, from the 224 px run.

python -m aimv2_jax.main --config=experiments/highres_448_base.py --workdir=DIR --config.init.path=RUN
"""

from ml_collections import ConfigDict

from experiments.highres import highres_config


def get_config() -> ConfigDict:
    return highres_config("base", 448)
