"""A small but complete AIMv2 on the bundled images: both losses, two sources, two caption types, on two CPU cores.

python -m aimv2_jax.main --config=experiments/quickstart.py --workdir=runs/quickstart
"""

from ml_collections import ConfigDict

from aimv2_jax.models.sizes import ENCODER_SIZES
from experiments import base

SAMPLE = "package:data/sample"


def get_config() -> ConfigDict:
    config = base.get_config()
    size = ENCODER_SIZES["tiny"]
    config.model.encoder.update(width=size.width, depth=size.depth, heads=size.heads)
    config.model.decoder.update(width=192, depth=4, heads=3, vocab_size=1024, text_length=40)
    config.model.layers = "loop"  # Compilation takes two seconds more than with "scan", a step a sixth less.
    config.model.compute_dtype = "float32"  # CPUs have no fast bfloat16.
    config.optimizer.update(warmup_steps=40, schedule_steps=320, weight_decay=1e-4, peak_lr=1e-3)
    config.data.update(
        batch_size=32,
        image_size=112,
        workers=1,
        sources={"photo": f"{SAMPLE}/train/photo", "other": f"{SAMPLE}/train/other"},
        mixture={"photo": {"alt": 0.25, "synthetic": 0.25}, "other": {"alt": 0.25, "synthetic": 0.25}},
    )
    config.tokenizer.path = f"{SAMPLE}/tokenizer.model"
    config.eval.update(sources={"photo": f"{SAMPLE}/test/photo", "other": f"{SAMPLE}/test/other"}, batch_size=64)
    config.train.update(steps=320, log_every=10, eval_every=80, save_every=40, keep=2)
    return config
