"""Distillation in small, for two CPU cores: a student of half the width learns from a teacher that was trained here.

python -m aimv2_jax.main --config=experiments/quickstart.py --workdir=runs/quickstart
python -m aimv2_jax.main --config=experiments/distill_small.py:sample --workdir=runs/distill/sample

The runs on pairs compare a student of `comparison.py`'s AIMv2 with the same student alone, on the same images:
python -m aimv2_jax.main --config=experiments/distill_small.py:pairs --workdir=runs/distill/pairs
python -m aimv2_jax.main --config=experiments/distill_small.py:pairs_alone --workdir=runs/distill/pairs_alone
"""

from ml_collections import ConfigDict

from experiments import comparison, quickstart
from experiments.teachers import use_teacher

RUNS = ("sample", "pairs", "pairs_alone")


def get_config(run: str) -> ConfigDict:
    """`sample`: on the bundled images; `pairs`: on those of `comparison.py`; `pairs_alone`: without a teacher."""
    teacher = quickstart.get_config() if run == "sample" else comparison.get_config("aimv2")
    config = teacher.copy_and_resolve_references()
    for trunk in (config.model.encoder, config.model.decoder):
        trunk.width //= 2
    if run == "sample":
        use_teacher(config, teacher, "runs/quickstart")
    if run == "pairs":
        use_teacher(config, teacher, "runs/comparison/aimv2")
    return config
