"""Captioning like OpenVision 2: full attention, and the decoder gets 35 % of the encoder's tokens.

90 of 256 tokens are sampled for every example; evaluation and caption generation use all. The rate is OpenVision 2's;
everything else is as in captioning_full.py, for comparison. [O]

python -m aimv2_jax.main --config=experiments/ablations/captioning_rows_35.py --workdir=DIR
"""

from ml_collections import ConfigDict

from experiments.ablation import captioning_config


def get_config() -> ConfigDict:
    config = captioning_config()
    config.model.encoder.attention_mask = "full"
    config.model.decoder.token_keep_rate = 0.35
    return config
