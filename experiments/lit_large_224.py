"""LiT of AIMv2-L at 224 px: a text tower is aligned with the frozen encoder on 3 billion pairs, for zero-shot use.

python -m aimv2_jax.main --config=experiments/lit_large_224.py --workdir=DIR --config.init.path=RUN

Published zero-shot top-1 on ImageNet-1k: 77.0 [P: Table 5]. The architecture is that of aimv2-large-patch14-224-lit
[R]; of the training the paper gives the 3 billion pairs alone. The rest is [O], after public recipes of the same kind:
big_vision's LiT (batch 16,384; Adam with a peak rate of 1e-3 and a decoupled decay of 1e-4, gradient norm 1, 10,000
steps of warm-up, a cosine) and ml-l3m's contrastive config (betas 0.9 and 0.95, final rate 1e-6, the same crops and
flips as in pre-training; no decay of biases, positions, norms and scale).
"""

from ml_collections import ConfigDict

from experiments import pretrain

PAIRS = 3_000_000_000  # [P: Table 5]
BATCH_SIZE = 16_384


def get_config() -> ConfigDict:
    config = pretrain.get_config("large")
    config.task = "lit"
    config.init.update(path="runs/pretrain_large_224", parts="encoder")
    # CLIP's vocabulary, from python -m aimv2_jax.prepare.tokenizer clip. [R]
    config.tokenizer.path = "data/clip/tokenizer.json"
    steps = -(-PAIRS // BATCH_SIZE)
    config.data.batch_size = BATCH_SIZE
    config.optimizer.update(
        peak_lr=1e-3, end_lr=1e-6, warmup_steps=10_000, schedule_steps=steps, weight_decay=1e-4, clip_norm=1.0
    )
    config.train.update(steps=steps, eval_every=5000)
    return config
