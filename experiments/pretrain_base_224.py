"""AIMv2-base at 224 px on the paper's mixture: 12 billion pairs in batches of 8192.

python -m aimv2_jax.main --config=experiments/pretrain_base_224.py --workdir=DIR
"""

from ml_collections import ConfigDict

from aimv2_jax.models.sizes import ENCODER_SIZES
from experiments import base, mixtures


def get_config() -> ConfigDict:
    config = base.get_config()
    size = ENCODER_SIZES["base"]
    config.model.encoder.update(width=size.width, depth=size.depth, heads=size.heads)  # [P]
    config.optimizer.peak_lr = 1e-3  # [O: the paper gives none for this size; that of large]
    mixtures.use_paper_mixture(config)
    return config
