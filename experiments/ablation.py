"""Shared configs of the baselines and ablations; `ablations/*.py` are the runs.

The paper compares ViT-L or H after 2 billion pairs, by frozen-trunk accuracy on ImageNet-1k, VQAv2 and TextVQA [P:
Table 9; RECIPE.md §10]. Each file's docstring gives the published scores in this order, if there are any.
"""

import math

from ml_collections import ConfigDict

from experiments.pretrain import pretrain_config

SAMPLES = 2 * 10**9  # [P]


def ablation_config() -> ConfigDict:
    """AIMv2-large at 224 px on 2 billion pairs of the pre-training mixture, with a schedule of that length.

    Large is the cheaper of the two sizes [O]. Warm-up and peak are those of pre-training [O: none is published].
    """
    config = pretrain_config("large")
    steps = -(-SAMPLES // config.data.batch_size)
    config.optimizer.schedule_steps = steps
    config.train.steps = steps
    return config


def captioning_config() -> ConfigDict:
    """The baseline without the image loss (alpha = 0); the loss is not computed."""
    config = ablation_config()
    config.loss.image = False
    return config


# --- the resolution curriculum: two runs, small images first --------------------------------------------------------

SMALL_SHARE = 0.8  # Fraction of the samples at 112 px, with a quarter of the patches. [O]


def small_stage_config() -> ConfigDict:
    """The first run: images of 112 px, on the full schedule, which it leaves after its fraction of the steps."""
    config = ablation_config()
    config.data.image_size = 112
    config.train.steps = round(SMALL_SHARE * config.train.steps)
    return config


def large_stage_config() -> ConfigDict:
    """The second run: 224 px, from the point where the first run left the schedule to the same end.

    Adam's moments restart, hence a short warm-up. Weight decay is a fraction per step at the peak rate; the peak is
    lower here and the decay is scaled with it, so the decay continues unchanged. The seed differs because example
    numbers restart at 0: the run must not repeat the first examples. All [O].
    """
    whole, small = ablation_config(), small_stage_config()
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
