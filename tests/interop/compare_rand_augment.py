"""Compares RandAugment with timm's `auto_augment.py`, which needs Pillow and numpy only and is loaded by its path.

Run by hand, since timm is no requirement; where it is installed, tests/data/transforms/test_rand_augment.py does the
same. From the repository's root:

    .venv/bin/pip download --no-deps --dest DIR timm
    .venv/bin/python tests/interop/compare_rand_augment.py DIR/timm-*.whl

Result with timm 1.0.31 and Pillow 12.3: all pixels are equal, of 15 operations at 21 magnitudes in both directions on
ten photographs, and of the policy rand-m9-mstd0.5-inc1 with our draws on 2,000 examples.
"""

from __future__ import annotations

import importlib.util
import io
import random
import sys
import tempfile
import zipfile
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from unittest import mock

import numpy as np
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[2]))
from aimv2_jax.data.transforms.rand_augment import OPERATIONS, RandAugment, Step

FILL = (124, 116, 104)
THEIR_NAMES = {
    "auto_contrast": "AutoContrast", "equalize": "Equalize", "invert": "Invert", "rotate": "Rotate",
    "posterize": "PosterizeIncreasing", "solarize": "SolarizeIncreasing", "solarize_add": "SolarizeAdd",
    "color": "ColorIncreasing", "contrast": "ContrastIncreasing", "brightness": "BrightnessIncreasing",
    "sharpness": "SharpnessIncreasing", "shear_x": "ShearX", "shear_y": "ShearY", "translate_x": "TranslateXRel",
    "translate_y": "TranslateYRel",
}  # fmt: skip
POLICY = "rand-m9-mstd0.5-inc1"


def load_timm(file: Path) -> ModuleType:
    """The module of timm's `auto_augment.py`, without timm's package, which imports torch."""
    spec = importlib.util.spec_from_file_location("timm_auto_augment", file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def hparams() -> dict:
    """What timm's `create_transform` gives for bicubic interpolation and a mean colour."""
    return {"img_mean": FILL, "interpolation": Image.Resampling.BICUBIC, "translate_const": 100}


def operation_differences(timm: ModuleType, images: Sequence[Image.Image]) -> list[str]:
    """Operations, magnitudes and directions whose pixels differ."""
    assert set(THEIR_NAMES) == set(OPERATIONS)
    wrong = []
    for name, theirs in THEIR_NAMES.items():
        for magnitude in np.linspace(0, 10, 21):
            for direction in (1, -1):
                number = 0.5 - direction / 4  # timm negates a level for numbers above one half.
                operation = timm.AugmentOp(theirs, prob=1.0, magnitude=float(magnitude), hparams=hparams())
                for image in images:
                    with mock.patch.object(random, "random", lambda number=number: number):
                        expected = np.asarray(operation(image))
                    ours = np.asarray(Step(name, float(magnitude), direction)(image, FILL))
                    if not np.array_equal(ours, expected):
                        wrong.append(f"{name} at {magnitude:g}, {direction:+d}")
    return wrong


def policy_differences(timm: ModuleType, images: Sequence[Image.Image], examples: int) -> list[int]:
    """Examples whose pixels differ, where timm's random numbers are replaced by our draws."""
    policy = RandAugment(3, FILL)
    theirs = timm.rand_augment_transform(POLICY, hparams())
    assert theirs.num_layers == policy.count and len(theirs.ops) == len(OPERATIONS)
    assert {op.prob for op in theirs.ops} == {policy.probability}
    assert {(op.magnitude, op.magnitude_std) for op in theirs.ops} == {(policy.magnitude, policy.magnitude_std)}
    by_name = {op.name: op for op in theirs.ops}
    wrong = []
    for example in range(examples):
        image, steps = images[example % len(images)], policy.steps(example)
        for step in steps:
            operation = by_name[THEIR_NAMES[step.operation]]
            drawn = iter([0.25, 0.5 - step.direction / 4])
            with (
                mock.patch.object(random, "random", lambda drawn=drawn: next(drawn)),
                mock.patch.object(random, "gauss", lambda mean, std, step=step: step.magnitude),
            ):
                image = operation(image)
        if not np.array_equal(np.asarray(image), np.asarray(policy(images[example % len(images)], example))):
            wrong.append(example)
    return wrong


def main(wheel: Path) -> None:
    from aimv2_jax.data import records
    from aimv2_jax.data.sources import Source

    source = Source("photo", "package:data/sample/train/photo")
    images = [
        Image.open(io.BytesIO(records.decode(source.read(number)).image)).convert("RGB").resize((224, 224))
        for number in range(10)
    ]
    with tempfile.TemporaryDirectory() as folder:
        with zipfile.ZipFile(wheel) as archive:
            file = Path(archive.extract("timm/data/auto_augment.py", folder))
        timm = load_timm(file)
    print(f"operations that differ: {operation_differences(timm, images) or 'none'}")
    print(f"examples of {POLICY} that differ: {policy_differences(timm, images, 2000) or 'none'}")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
