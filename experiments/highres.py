"""The paper's high-resolution runs, SIZE,PIXELS: base, large, huge, 1b and 3b at 336 and 448 px, from the 224 px runs.

python -m aimv2_jax.main --config=experiments/highres.py:large,448 --workdir=DIR --config.init.path=RUN

SIZE,PIXELS,CHIP takes the defaults of a TPU generation (`tpu.py`).

Published top-1 of the attentive probe on ImageNet-1k: 3B at 448 px 89.5 (RECIPE.md §10).
"""

from ml_collections import ConfigDict

from experiments import mixtures, pretrain, tpu

SAMPLES = 2_000_000_000  # [P]
# Batch size by image size [O]: about as many patches, and so as much memory, as 8192 images at 224 px.
BATCH = {336: 4096, 448: 2048}
RUNS = tpu.with_chips(tuple(f"{size},{pixels}" for pixels in BATCH for size in pretrain.SIZES))


def get_config(run: str) -> ConfigDict:
    """The run of SIZE,PIXELS or SIZE,PIXELS,CHIP: 2 billion pairs without synthetic captions, no weight decay [P].

    It starts from the whole model of the 224 px run, `init.path`, with its position table resized. Ours: the batch,
    which keeps the patches of a step; the resulting steps; a tenth of the peak learning rate of pre-training, since
    it starts where that run ended (a hundredth of its peak), warmed up for 2,000 steps because Adam's moments are new.
    """
    size, pixels, *chip = run.split(",")
    batch_size = BATCH[int(pixels)]
    steps = -(-SAMPLES // batch_size)
    config = pretrain.get_config(",".join([size, *chip]))
    config.init.path = f"runs/pretrain_{size}_224"
    config.data.update(image_size=int(pixels), batch_size=batch_size)
    config.optimizer.update(
        peak_lr=config.optimizer.peak_lr / 10, warmup_steps=2000, schedule_steps=steps, weight_decay=0.0
    )
    config.train.update(steps=steps, eval_every=5000)
    if run in ("3b,448", "3b,448,v5e"):
        config.model.remat = "attention"  # "gate" leaves 3 % of a v5e's memory free; 5 % are required. [O]
    mixtures.use_alt_text_only(config)
    return config
