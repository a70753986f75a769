"""The paper's pre-training runs at 224 px: base, large, huge, 1b and 3b.

python -m aimv2_jax.main --config=experiments/pretrain.py:large --workdir=DIR
python -m aimv2_jax.main --config=experiments/pretrain.py:large,v6e --workdir=DIR

The second form takes the defaults of a TPU generation (`tpu.py`); the first is for slices of 256 v5e chips.

Published top-1 of the attentive probe on ImageNet-1k: L 86.6, H 87.5, 1B 88.1, 3B 88.5 (RECIPE.md §10).
"""

from ml_collections import ConfigDict

from aimv2_jax.models.sizes import ENCODER_SIZES
from experiments import base, mixtures, tpu

# The peak learning rate [P: Table A1; O: base has that of large, since the paper has no base].
PEAK_LR = {"base": 1e-3, "large": 1e-3, "huge": 8e-4, "1b": 8e-4, "3b": 4e-4}
SIZES = tuple(PEAK_LR)
RUNS = tpu.with_chips(SIZES)


def get_config(run: str) -> ConfigDict:
    """The run of SIZE or SIZE,CHIP at 224 px: the mixture of Table 2 for 1,500,000 steps of 8192 [P].

    CHIP decides how it runs, not what it learns; without one, it runs as on v5e.
    """
    size, _, chip = run.partition(",")
    config = base.get_config()
    encoder = ENCODER_SIZES[size]
    config.model.encoder.update(width=encoder.width, depth=encoder.depth, heads=encoder.heads)
    config.optimizer.peak_lr = PEAK_LR[size]
    tpu.use_chip(config, size, chip or "v5e")
    mixtures.use_paper_mixture(config)
    return config
