"""Shared config of the paper's high-resolution runs; `highres_PIXELS_SIZE.py` are the runs."""

from ml_collections import ConfigDict

from experiments import mixtures
from experiments.pretrain import pretrain_config

SAMPLES = 2_000_000_000  # [P]
# Batch size by image size [O]: about as many patches, and so as much memory, as 8192 images at 224 px.
BATCH = {336: 4096, 448: 2048}


def highres_config(size: str, pixels: int) -> ConfigDict:
    """The run of an encoder of `size` at `pixels`: 2 billion pairs without synthetic captions, no weight decay [P].

    It starts from the whole model of the 224 px run, `init.path`, with its position table resized. Ours: the batch,
    which keeps the patches of a step; the resulting steps; a tenth of the peak learning rate of pre-training, since
    it starts where that run ended (a hundredth of its peak), warmed up for 2,000 steps because Adam's moments are new.
    """
    config = pretrain_config(size)
    steps = -(-SAMPLES // BATCH[pixels])
    config.init.path = f"runs/pretrain_{size}_224"
    config.data.update(image_size=pixels, batch_size=BATCH[pixels])
    config.optimizer.update(
        peak_lr=config.optimizer.peak_lr / 10, warmup_steps=2000, schedule_steps=steps, weight_decay=0.0
    )
    config.train.update(steps=steps, eval_every=5000)
    if (size, pixels) == ("3b", 448):
        config.model.remat = "attention"  # "gate" leaves 3 % of a v5e's memory free; 5 % are required. [O]
    mixtures.use_alt_text_only(config)
    return config
