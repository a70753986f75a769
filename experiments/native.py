"""Fine-tuning at native resolution, from the 224 px run; the paper has one size, large.

python -m aimv2_jax.main --config=experiments/native.py:large --workdir=DIR --config.init.path=RUN

large,CHIP takes the defaults of a TPU generation (`tpu.py`).
"""

from ml_collections import ConfigDict

from experiments import mixtures, pretrain, tpu

RUNS = tpu.with_chips(("large",))
# 128 … 4096 patches. The paper draws n of 2^n from [7, 12] and states no rounding [P: §2.4]; a compiled step wants few
# shapes, so n is rounded [O]. The probability of each area: RECIPE.md §9.
AREAS = tuple(2**n for n in range(7, 13))
# Patches in a batch, C = A x B [P: C is constant; O: the value, 256 images of the largest area].
PATCHES = 2**20
SAMPLES = 2_000_000_000  # As in the high-resolution stage, at 256 patches each. [O]


def get_config(run: str) -> ConfigDict:
    """Fine-tuning of SIZE or SIZE,CHIP at native resolution, with positions of the actual grid (RECIPE.md §9) [P].

    It starts from the whole model of the 224 px run, `init.path`, except the position table: sin-cos embeddings replace
    it, and the blocks adapt to them in the warm-up. Ours: as many patches as the same number of images has at 224 px; a
    fifth of the peak learning rate of pre-training, since positions are new; no weight decay, as at high resolution.
    """
    size = run.partition(",")[0]
    config = pretrain.get_config(run)
    steps = -(-SAMPLES * 256 // PATCHES)
    config.init.update(path=f"runs/pretrain_{size}_224", ignore=("encoder/position",))
    config.model.encoder.position = "sincos"
    config.data.update(areas=AREAS, batch_size=PATCHES // AREAS[-1])
    config.optimizer.update(
        peak_lr=config.optimizer.peak_lr / 5, warmup_steps=5000, schedule_steps=steps, weight_decay=0.0
    )
    config.eval.area = 256
    config.train.update(steps=steps, eval_every=5000)
    mixtures.use_alt_text_only(config)
    return config
