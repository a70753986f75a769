"""AIMv2-1b at 224 px on the paper's mixture: 12 billion pairs in batches of 8192.

python -m aimv2_jax.main --config=experiments/pretrain_1b_224.py --workdir=DIR
"""

from ml_collections import ConfigDict

from aimv2_jax.models.sizes import ENCODER_SIZES
from experiments import base, mixtures


def get_config() -> ConfigDict:
    config = base.get_config()
    size = ENCODER_SIZES["1b"]
    config.model.encoder.update(width=size.width, depth=size.depth, heads=size.heads)  # [P]
    config.optimizer.peak_lr = 8e-4  # [P]
    config.mesh.update(
        data=-1, fsdp=16
    )  # [O: parameters and moments over one ring of 16 chips, whose gathers are cheap]
    mixtures.use_paper_mixture(config)
    return config
