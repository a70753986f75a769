"""The stages of AIMv2 in small, for two CPU cores: this file, `larger.py`, `native.py`; launch/stages.sh runs all.

python -m aimv2_jax.main --config=experiments/stages/small.py --workdir=runs/stages/small
"""

from ml_collections import ConfigDict

from experiments import quickstart

DATA = "data/pairs"  # Default folder of prepared pairs; launch/stages.sh sets its own.


def get_config() -> ConfigDict:
    config = quickstart.get_config()
    config.data.sources = {"pairs": f"{DATA}/train"}
    config.data.mixture = {"pairs": {"alt": 0.5, "synthetic": 0.5}}
    # All three stages train on alt-texts, so their losses are comparable between stages.
    config.eval.sources = {"pairs": f"{DATA}/test"}
    config.eval.update(caption_types=("alt",), batch_size=70, max_examples=280)
    config.optimizer.update(warmup_steps=50, schedule_steps=480)
    config.train.update(steps=480, eval_every=160, save_every=240, eval_at_start=True)
    return config
