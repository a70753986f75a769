"""The paper's baselines and ablations, and three ideas of other projects, each at ViT-L on 2 billion pairs.

python -m aimv2_jax.main --config=experiments/ablations.py:alpha_0_2 --workdir=DIR

The paper compares ViT-L or H after 2 billion pairs, by frozen-trunk accuracy on ImageNet-1k, VQAv2 and TextVQA [P:
Table 9; RECIPE.md §10]. Published scores are below in this order, where there are any.
"""

import math

from ml_collections import ConfigDict

from experiments import pretrain

SAMPLES = 2 * 10**9  # [P]

# By run: the keys in which it differs from AIMv2's, and its published scores.
CHANGES = {
    # The reference: both losses, alpha 0.4, one decoder of width 1024 and depth 12. 85.6 / 76.9 / 37.5
    "aimv2": {},
    # The image loss alone, and a head of 12 residual MLP blocks in place of the decoder. From AIMv1: objective, prefix
    # attention, the head's shape and initialisation (`models/baselines.py`) [R]. Encoder, data and optimiser are those
    # of AIMv2, and the head's blocks have our RMSNorm and SwiGLU, so that only the objective and its head differ.
    # alpha = 1, since the weight of a single loss would only scale a gradient that is clipped. [O] 72.0 / 65.4 / 12.7
    "aimv1": {
        "loss.text": False,
        "loss.alpha": 1.0,
        "model.decoder.kind": "mlp",
        "model.decoder.width": 2048,
        "model.decoder.depth": 12,
    },
    "alpha_0_2": {"loss.alpha": 0.2},  # 85.6 / 76.7 / 37.4
    "alpha_0_6": {"loss.alpha": 0.6},  # 85.6 / 76.7 / 37.4
    # Captioning has no image loss (alpha = 0; it is not computed); full attention is bidirectional. 85.1 / 76.2 / 34.4
    "captioning_full": {"loss.image": False, "model.encoder.attention_mask": "full"},
    "captioning_prefix": {"loss.image": False},  # 85.4 / 76.8 / 36.5
    # OpenVision 2's rate, everything else as in captioning_full: the decoder gets 90 of the encoder's 256 tokens,
    # sampled for every example; evaluation and caption generation use all. [O]
    "captioning_rows_35": {
        "loss.image": False,
        "model.encoder.attention_mask": "full",
        "model.decoder.token_keep_rate": 0.35,
    },
    "decoder_depth_8": {"model.decoder.depth": 8},  # 85.5 / 76.7 / 37.0
    "decoder_depth_16": {"model.decoder.depth": 16},  # 85.6 / 76.9 / 36.6
    # Heads keep 128 channels. 85.3 / 76.2 / 35.9, and 85.1 / 76.9 / 36.9
    "decoder_width_512": {"model.decoder.width": 512, "model.decoder.heads": 4},
    "decoder_width_1536": {"model.decoder.width": 1536, "model.decoder.heads": 12},
    # One decoder for the image and one for the text, each with the width and depth of the joint one, and its own
    # projection of the features. [O: the paper does not specify them] 85.6 / 77.1 / 37.2
    "separate_decoders": {"model.decoder.kind": "separate"},
    # A moving average of the parameters, which is evaluated too and replaces them in export and probes. A decay of
    # 0.9999 averages over about 10,000 of the run's 244,141 steps. [O]
    "ema": {"optimizer.ema_decay": 0.9999},
}


def get_config(run: str) -> ConfigDict:
    """A run of `CHANGES`, or one of the two of the resolution curriculum."""
    if run in CURRICULUM:
        return CURRICULUM[run]()
    config = aimv2_config()
    config.update_from_flattened_dict(CHANGES[run])
    return config


def aimv2_config() -> ConfigDict:
    """AIMv2-large at 224 px on 2 billion pairs of the pre-training mixture, with a schedule of that length.

    Large is the cheaper of the two sizes [O]. Warm-up and peak are those of pre-training [O: none is published].
    """
    config = pretrain.get_config("large")
    steps = -(-SAMPLES // config.data.batch_size)
    config.optimizer.schedule_steps = steps
    config.train.steps = steps
    return config


# --- the resolution curriculum: two runs, small images first --------------------------------------------------------

SMALL_SHARE = 0.8  # Fraction of the samples at 112 px, with a quarter of the patches. [O]


def small_images_config() -> ConfigDict:
    """The first run: images of 112 px, on the full schedule, which it leaves after its fraction of the steps."""
    config = aimv2_config()
    config.data.image_size = 112
    config.train.steps = round(SMALL_SHARE * config.train.steps)
    return config


def large_images_config() -> ConfigDict:
    """The second run: 224 px, from the parameters of the first, `init.path`, to the end of the same schedule.

    It starts at the point where the first run left the schedule. Its position table of 8 x 8 patches is interpolated
    to 16 x 16. Adam's moments restart, hence a short warm-up. Weight decay is a fraction per step at the peak rate; the
    peak is lower here and the decay is scaled with it, so the decay continues unchanged. The seed differs because
    example numbers restart at 0: the run must not repeat the first examples. All [O].
    """
    whole, small = aimv2_config(), small_images_config()
    schedule, left = whole.optimizer, small.train.steps
    done = (left - schedule.warmup_steps) / (schedule.schedule_steps - schedule.warmup_steps)
    rate = schedule.end_lr + (schedule.peak_lr - schedule.end_lr) * math.cos(math.pi / 2 * done) ** 2
    steps = whole.train.steps - left
    whole.optimizer.update(
        peak_lr=rate,
        weight_decay=schedule.weight_decay * rate / schedule.peak_lr,
        warmup_steps=1000,
        schedule_steps=steps,
    )
    whole.train.steps = steps
    whole.seed += 1
    return whole


CURRICULUM = {"curriculum_1_112": small_images_config, "curriculum_2_224": large_images_config}
RUNS = (*CHANGES, *CURRICULUM)
