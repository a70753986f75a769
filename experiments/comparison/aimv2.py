"""AIMv2 in small on real pairs, to be probed beside its baselines; all of them: launch/comparison.sh.

python -m aimv2_jax.main --config=experiments/comparison/aimv2.py --workdir=runs/comparison/aimv2
"""

from ml_collections import ConfigDict

from experiments import quickstart

DATA = "data/pairs"  # Where launch/comparison.sh prepares the pairs it is given.


def get_config() -> ConfigDict:
    config = quickstart.get_config()
    config.data.sources = {"pairs": f"{DATA}/train"}
    config.data.mixture = {"pairs": {"alt": 0.5, "synthetic": 0.5}}
    config.data.update(
        image_size=84,  # 36 patches: what two cores see most pictures at.
        batch_size=64,
        crop_area=(0.2, 1.0),  # Three thousand pairs are soon known by heart: smaller crops keep them new for longer.
    )
    config.model.decoder.update(depth=2, text_length=24)
    config.optimizer.update(warmup_steps=100, schedule_steps=1600, peak_lr=1e-3, weight_decay=1e-3)
    config.eval.sources = {"pairs": f"{DATA}/test"}
    config.eval.update(kinds=("alt",), batch_size=70, max_examples=280)
    config.train.update(steps=1600, log_every=20, eval_every=400, save_every=400)
    return config
