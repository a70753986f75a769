"""The three stages of AIMv2 in small, for two CPU cores; launch/stages.sh runs all of them.

python -m aimv2_jax.main --config=experiments/stages.py:small --workdir=runs/stages/small
python -m aimv2_jax.main --config=experiments/stages.py:larger --workdir=runs/stages/larger
python -m aimv2_jax.main --config=experiments/stages.py:native --workdir=runs/stages/native

Each starts from the model of the previous one. Results: `results/stages.md`.
"""

from ml_collections import ConfigDict

from experiments import quickstart

DATA = "data/pairs"  # Default folder of prepared pairs; launch/stages.sh sets its own.
RUNS = ("small", "larger", "native")


def get_config(stage: str) -> ConfigDict:
    return {"small": small_config, "larger": larger_config, "native": native_config}[stage]()


def small_config() -> ConfigDict:
    """Pre-training at 112 px."""
    config = quickstart.get_config()
    config.data.sources = {"pairs": f"{DATA}/train"}
    config.data.mixture = {"pairs": {"alt": 0.5, "synthetic": 0.5}}
    # All three stages train on alt-texts, so their losses are comparable between stages.
    config.eval.sources = {"pairs": f"{DATA}/test"}
    config.eval.update(caption_types=("alt",), batch_size=70, max_examples=280)
    config.optimizer.update(warmup_steps=50, schedule_steps=480)
    config.train.update(steps=480, eval_every=160, save_every=240, eval_at_start=True)
    return config


def larger_config() -> ConfigDict:
    """High resolution: 168 px, without synthetic captions or weight decay."""
    config = small_config()
    config.init.path = "runs/stages/small"
    config.data.update(image_size=168, batch_size=16)  # 144 patches: about the patches of 32 images at 112 px.
    config.data.mixture = {"pairs": {"alt": 1.0}}
    config.optimizer.update(peak_lr=2e-4, warmup_steps=20, schedule_steps=160, weight_decay=0.0)
    config.train.update(steps=160, eval_every=80, save_every=80)
    return config


def native_config() -> ConfigDict:
    """Native resolution: areas of 32 to 256 patches."""
    config = larger_config()
    config.init.update(path="runs/stages/larger", ignore=("encoder/position",))
    config.model.encoder.position = "sincos"
    config.data.update(areas=(32, 64, 128, 256), batch_size=8)
    config.optimizer.update(peak_lr=4e-4, schedule_steps=240)
    config.eval.area = 144  # The patches of an image in the previous stage.
    config.train.update(steps=240)
    return config
