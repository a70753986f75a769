"""LiT in small on real pairs: a text tower is aligned with the frozen encoder of `comparison.py`'s AIMv2.

python -m aimv2_jax.main --config=experiments/lit_small.py:aimv2 --workdir=runs/lit/aimv2

Results: `results/lit.md`.
"""

from ml_collections import ConfigDict

from experiments import comparison

RUNS = ("aimv2", "random")


def get_config(run: str) -> ConfigDict:
    """`aimv2`: on the encoder of runs/comparison/aimv2; `random`: on an encoder that was never trained."""
    config = comparison.get_config("aimv2")
    config.task = "lit"
    if run == "aimv2":
        config.init.update(path="runs/comparison/aimv2", parts="encoder")
    else:
        config.init.reinit = ("encoder",)
    config.lit.text.update(width=128, depth=4, heads=2, vocab_size=config.model.decoder.vocab_size, text_length=24)
    config.lit.embed_dim = 128
    config.optimizer.update(warmup_steps=50, schedule_steps=600, peak_lr=1e-3, end_lr=1e-6, weight_decay=1e-3)
    config.data.batch_size = 128
    config.train.update(steps=600, log_every=20, eval_every=200, save_every=200)
    return config
