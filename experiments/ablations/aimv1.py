"""AIMv1: the image loss alone, and a head of 12 residual MLP blocks of width 2048 in place of the decoder.

From AIMv1: objective, prefix attention, the head's shape and initialisation (`models/baselines.py`) [R]. Encoder, data
and optimiser are those of AIMv2, and the head's blocks have our RMSNorm and SwiGLU, so that only the objective and its
head differ. alpha = 1, since the weight of a single loss would only scale a gradient that is clipped. [O]

Published: 72.0 / 65.4 / 12.7.

python -m aimv2_jax.main --config=experiments/ablations/aimv1.py --workdir=DIR
"""

from ml_collections import ConfigDict

from experiments.ablation import ablation_config


def get_config() -> ConfigDict:
    config = ablation_config()
    config.loss.update(text=False, alpha=1.0)
    config.model.decoder.update(kind="mlp", width=2048, depth=12)
    return config
