"""AIMv2-large at native resolution, from the 224 px run.

python -m aimv2_jax.main --config=experiments/native_large.py --workdir=DIR --config.init.path=RUN
"""

from ml_collections import ConfigDict

from experiments.native import native_config


def get_config() -> ConfigDict:
    return native_config("large")
