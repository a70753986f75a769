"""The native-resolution stage in small: areas of 32 to 256 patches, from the model of `larger.py`.

python -m aimv2_jax.main --config=experiments/stages/native.py --workdir=runs/stages/native
"""

from ml_collections import ConfigDict

from experiments.stages import larger


def get_config() -> ConfigDict:
    config = larger.get_config()
    config.init.update(path="runs/stages/larger", ignore=("encoder/position",))
    config.model.encoder.position = "sincos"
    config.data.update(areas=(32, 64, 128, 256), batch_size=8)
    config.optimizer.update(peak_lr=4e-4, schedule_steps=240)
    config.eval.area = 144  # The patches of an image in the previous stage.
    config.train.update(steps=240)
    return config
