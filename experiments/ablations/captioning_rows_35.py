"""Captioning as OpenVision 2 does it: full attention, and the decoder is given 35 % of the encoder's rows.

Of 256 rows 90, drawn anew for every example; evaluation and captions read all. The share is OpenVision 2's, the rest is
that of captioning_full.py, to be compared with it. [O]

python -m aimv2_jax.main --config=experiments/ablations/captioning_rows_35.py --workdir=DIR
"""

from ml_collections import ConfigDict

from experiments.ablation import captioning_config


def get_config() -> ConfigDict:
    config = captioning_config()
    config.model.encoder.attention_mask = "full"
    config.model.decoder.keep_rows = 0.35
    return config
