"""The high-resolution stage in small: 168 px from the model of `small.py`, without synthetic captions or weight decay.

python -m aimv2_jax.main --config=experiments/stages/larger.py --workdir=runs/stages/larger
"""

from ml_collections import ConfigDict

from experiments.stages import small


def get_config() -> ConfigDict:
    config = small.get_config()
    config.init.path = "runs/stages/small"
    config.data.update(image_size=168, batch_size=16)  # 144 patches: about the patches of 32 images at 112 px.
    config.data.mixture = {"pairs": {"alt": 1.0}}
    config.optimizer.update(peak_lr=2e-4, warmup_steps=20, schedule_steps=160, weight_decay=0.0)
    config.train.update(steps=160, eval_every=80, save_every=80)
    return config
