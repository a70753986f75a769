"""Compares timm's features of an export under Apple's names with ours.

torchvision and a CUDA build of torch need several GB, so this is no test. From the repository's root:

    .venv/bin/python tests/interop/compare_timm.py make DIR [SPEC]
    python3 -m venv OTHER && OTHER/bin/pip install -r tests/interop/requirements_timm.txt
    OTHER/bin/python tests/interop/compare_timm.py compare DIR

`make` writes an encoder with random parameters in the size of aimv2_large_patch14_224, or takes SPEC, and lets
`python -m aimv2_jax.export --format apple` and `python -m aimv2_jax.eval.features` write its export and the features
of a few images at the model's own size. `compare` loads the export in timm from its folder, and for a released size
also by timm's name of the model, and prints the largest difference of features in units of their largest entry; it
fails above 2e-5.

Result with the pinned versions: 2.2e-6 for both ways, at the size of aimv2_large_patch14_224.
"""

import json
import sys
from pathlib import Path

import numpy as np
from PIL import Image

COUNT = 4
TOLERANCE = 2e-5


def make(folder: Path, spec: str | None) -> None:
    sys.path.insert(0, str(Path(__file__).parents[2]))
    from aimv2_jax.eval import features
    from aimv2_jax.export import __main__ as export
    from aimv2_jax.export.orbax_export import write_weights
    from aimv2_jax.pretrained.encoder_spec import EncoderSpec
    from aimv2_jax.pretrained.source import in_memory, open_weights

    folder.mkdir(parents=True)
    if spec is None:
        encoder_spec, rng = EncoderSpec(1024, 24, 8, 2816, 14, 224, "learned"), np.random.default_rng(0)

        def draw(name: str, shape: tuple[int, ...]) -> np.ndarray:
            noise = rng.standard_normal(shape, np.float32) * np.float32(shape[-2] ** -0.5 if "kernel" in name else 0.1)
            return noise + np.float32(name.endswith("scale"))

        arrays = {name: draw(name, shape) for name, shape in encoder_spec.shapes().items()}
        spec = str(folder / "encoder")
        write_weights(Path(spec), in_memory("random parameters", encoder_spec, arrays))
    size = open_weights(spec).spec.image_size
    (folder / "images").mkdir()
    for number in range(COUNT):
        # Smooth noise; at the model's own size, neither timm nor we resize.
        noise = np.random.default_rng(number).integers(256, size=(size // 8, size // 8, 3), dtype=np.uint8)
        Image.fromarray(noise).resize((size, size), Image.Resampling.BICUBIC).save(folder / f"images/{number}.png")
    assert export.main([f"--checkpoint={spec}", f"--output={folder / 'exported'}", "--format=apple"]) == 0
    features_of = [f"--checkpoint={spec}", f"--input={folder / 'images'}", f"--output={folder / 'features'}"]
    assert features.main(features_of) == 0


def compare(folder: Path) -> None:
    import timm
    import torch

    exported = folder / "exported"
    models = {"local-dir": timm.create_model(f"local-dir:{exported}", pretrained=True)}
    config = json.loads((exported / "config.json").read_text())
    if "model_args" not in config:
        overlay = {"file": str(exported / "model.safetensors")}
        name = config["architecture"]
        models[name] = timm.create_model(name, pretrained=True, pretrained_cfg_overlay=overlay)
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(models["local-dir"]))
    worst = 0.0
    for path in sorted((folder / "images").iterdir()):
        with np.load(folder / "features" / f"{path.stem}.npz") as file:
            ours = file["features"]
        pixels = transform(Image.open(path).convert("RGB"))[None]
        for name, model in models.items():
            with torch.no_grad():
                theirs = model.eval().forward_features(pixels)[0].numpy()
            difference = np.abs(theirs - ours.reshape(theirs.shape)).max() / np.abs(ours).max()
            worst = max(worst, difference)
            print(f"{path.name}, {name}: features {theirs.shape} differ by {difference:.1e} of the largest entry")
    print(f"timm {timm.__version__}, torch {torch.__version__}: largest difference {worst:.1e}")
    assert worst <= TOLERANCE


if __name__ == "__main__":
    command, directory = sys.argv[1], Path(sys.argv[2])
    make(directory, sys.argv[3] if len(sys.argv) > 3 else None) if command == "make" else compare(directory)
