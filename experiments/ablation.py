"""What the baselines and ablations have in common; `ablations/*.py` are the runs.

The paper compares ViT-L or H after 2 billion pairs, by frozen-trunk accuracy on ImageNet-1k, VQAv2 and TextVQA [P:
Table 9; RECIPE.md §10]. Its scores stand in each file's docstring, in this order; where there are none, none are
published.
"""

import math

from ml_collections import ConfigDict

from experiments.pretrain import pretrain_config

SAMPLES = 2 * 10**9  # [P]


def ablation_config() -> ConfigDict:
    """AIMv2-large at 224 px on 2 billion pairs of the pre-training mixture, to the end of its own schedule.

    Of the two sizes we take large, the cheaper [O]. Warm-up and peak stay those of pre-training [O: none is published].
    """
    config = pretrain_config("large")
    steps = -(-SAMPLES // config.data.batch_size)
    config.optimizer.schedule_steps = steps
    config.train.steps = steps
    return config


def captioning_config() -> ConfigDict:
    """The baseline without the image loss (alpha = 0), which then is not computed at all."""
    config = ablation_config()
    config.loss.image = False
    return config


# --- the resolution curriculum: two runs, small pictures first ------------------------------------------------------

SMALL_SHARE = 0.8  # Of the samples, at 112 px: a quarter of the patches each. [O]


def small_stage_config() -> ConfigDict:
    """The first run: pictures of 112 px, along the schedule of the whole, which it leaves after its share."""
    config = ablation_config()
    config.data.image_size = 112
    config.train.steps = round(SMALL_SHARE * config.train.steps)
    return config


def large_stage_config() -> ConfigDict:
    """The second run: 224 px, from where the first one left the schedule down to the same end.

    Adam's moments start anew, hence a short warm-up. Decay is a fraction a step at the peak, which is lower here: so is
    the fraction, and decay goes on as it was. Another seed, since examples are counted anew: not the first ones again.
    All [O].
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
