"""AIMv2-L at 224 px distilled from AIMv2-3B: its features and text logits, beside the losses of pre-training.

python -m aimv2_jax.main --config=experiments/distill_large_from_3b.py --workdir=DIR --config.distill.path=RUN

Apple released such a model (aimv2-large-patch14-224-distilled) and no recipe, so everything here is [O]:
- Student, data, crops, optimiser and own losses are those of pre-training, as DINOv3's distilled models keep their
  method's losses and crops. One frozen teacher sees each student's own crop, as there.
- Features: the patches after the final norm, through a linear map from width 1024 to 3072, as timm's feature
  distillation has one; by their cosine, which MaxText offers beside l2, since it leaves the norms free.
- Text logits: the KL divergence, multiplied by temperature squared, as in timm and MaxText. The temperature is 1,
  because a vocabulary of 32,000 has no need to be softened.
- All weights are 1: none of these recipes has values for such a sum.
- Length: 2 billion pairs, that of the paper's later stages, in place of 12 billion.

Apple's released 3B is an encoder alone; for it give --config.distill.logits=0.
"""

from ml_collections import ConfigDict

from experiments import pretrain
from experiments.teachers import use_teacher

PAIRS = 2_000_000_000


def get_config() -> ConfigDict:
    config = pretrain.get_config("large")
    use_teacher(config, pretrain.get_config("3b"), path="runs/pretrain_3b_224")
    config.distill.update(features=1.0, logits=1.0, pixels=0.0, own=1.0, feature_loss="cosine", temperature=1.0)
    steps = -(-PAIRS // config.data.batch_size)
    config.optimizer.schedule_steps = steps
    config.train.steps = steps
    return config
