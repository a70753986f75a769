"""The stages of AIMv2 in small, for two CPU cores: this, `larger.py`, `native.py`; all three: launch/stages.sh.

python -m aimv2_jax.main --config=experiments/stages/small.py --workdir=runs/stages/small
"""

from ml_collections import ConfigDict

from experiments import quickstart

DATA = "data/pairs"  # Where launch/stages.sh prepares the pairs it is given.


def get_config() -> ConfigDict:
    config = quickstart.get_config()
    config.data.sources = {"pairs": f"{DATA}/train"}
    config.data.mixture = {"pairs": {"alt": 0.5, "synthetic": 0.5}}
    # Of the captions that all three stages train on: losses of one stage can be held against those of the next.
    config.eval.sources = {"pairs": f"{DATA}/test"}
    config.eval.update(kinds=("alt",), batch_size=70, max_examples=280)
    config.optimizer.update(warmup_steps=50, schedule_steps=480)
    config.train.update(steps=480, eval_every=160, save_every=240, eval_at_start=True)
    return config
