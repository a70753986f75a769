"""Compares the centre view with torchvision, by the exported image processor and by Resize and CenterCrop on Pillow.

Run by hand, never by pytest or CI: transformers uses its torchvision processor only if torchvision is installed, which
needs an environment of its own (several GB). From the repository's root:

    .venv/bin/python tests/interop/compare_torchvision.py make DIR [SPEC]
    python3 -m venv OTHER && OTHER/bin/pip install -r tests/interop/requirements.txt
    OTHER/bin/python tests/interop/compare_torchvision.py compare DIR

`make` writes images, the pixels and features of `load_encoder` for each, and an export of SPEC (runs/quickstart).
`compare` prints the differences of the other ways: pixels in 1/255, features in units of their largest entry.

Results with the pinned versions, 100 images at 112 pixels, the quickstart's model after 20 steps:
- the processor, given images from `load_image`: within 1 except for 5 of 3,763,200 values, which differ by 2
  (torchvision also rounds between its two passes); features: median 6.5e-4, worst 6.8e-3 of the largest entry;
- the processor, given paths: the same, but torchvision's decoder keeps a transparent colour that Pillow makes white;
- torchvision's `Resize` and `CenterCrop` on Pillow images: equal except for those colours and images of which 3, 7,
  11, ... pixels are cropped in all (6 of 100): `CenterCrop` rounds half to even, one pixel away from both processors;
  features there: median 0.16. With the crop rounded down, all images without a transparent colour are equal, byte for
  byte.
Apple's `val_transforms` of AIM v1 are the same with another size: they resize to 8/7 of the side (256 for 224).
"""

import sys
from pathlib import Path

import numpy as np

COUNT = 100


def make(folder: Path, spec: str) -> None:
    sys.path.insert(0, str(Path(__file__).parents[2]))
    from aimv2_jax import load_encoder
    from aimv2_jax.export import __main__ as hf
    from tests.helpers.real_images import write_images

    images = folder / "images"
    images.mkdir(parents=True)
    paths = write_images(images, COUNT)
    encoder = load_encoder(spec)
    np.savez(folder / "ours.npz", pixels=[encoder.pixels(path) for path in paths], features=encoder(paths))
    hf.main([f"--checkpoint={spec}", f"--output={folder / 'exported'}"])


def compare(folder: Path) -> None:
    import torch
    import transformers
    from PIL import Image
    from torchvision import transforms
    from transformers.image_utils import load_image

    paths = sorted((folder / "images").iterdir())
    with np.load(folder / "ours.npz") as ours:
        pixels, features = ours["pixels"], ours["features"]
    processor = transformers.AutoImageProcessor.from_pretrained(folder / "exported")
    assert processor.backend == "torchvision"
    model = transformers.Aimv2VisionModel.from_pretrained(folder / "exported").eval()
    size, steps = pixels.shape[1], {"do_rescale": False, "do_normalize": False}
    resize = transforms.Compose([transforms.Resize(size, transforms.InterpolationMode.BICUBIC)])
    crop = transforms.CenterCrop(size)

    def floor_crop(image: Image.Image) -> Image.Image:
        left, top = (image.width - size) // 2, (image.height - size) // 2
        return image.crop((left, top, left + size, top + size))

    loaded = [load_image(str(path)) for path in paths]
    resized = [resize(image.convert("RGB")) for image in loaded]
    odd = np.array([(max(image.size) - size) % 4 == 3 for image in resized])
    # Only the processor makes a transparent colour white.
    transparent = np.array([image.info.get("transparency") is not None for image in loaded])
    ways = {
        "processor, images by load_image": [np.asarray(processor(i, **steps)["pixel_values"][0]) for i in loaded],
        "processor, paths": [np.asarray(processor(str(p), **steps)["pixel_values"][0]) for p in paths if readable(p)],
        "Resize, CenterCrop": [np.asarray(crop(image)).transpose(2, 0, 1) for image in resized],
        "Resize, crop rounded down": [np.asarray(floor_crop(image)).transpose(2, 0, 1) for image in resized],
    }
    is_readable = np.array([readable(path) for path in paths])
    for name, theirs in ways.items():
        used = is_readable if name == "processor, paths" else np.ones(len(paths), bool)
        theirs = np.stack(theirs)
        pixel_difference = np.abs(theirs.transpose(0, 2, 3, 1).astype(int) - pixels[used]).max((1, 2, 3))
        mean, std = (torch.tensor(value).view(3, 1, 1) for value in (processor.image_mean, processor.image_std))
        with torch.no_grad():
            their_features = model((torch.from_numpy(theirs) / 255 - mean) / std).last_hidden_state.numpy()
        difference = np.abs(their_features - features[used]).max((1, 2)) / np.abs(features[used]).max()
        groups = {"all": used, "crop rounded otherwise": used & odd, "a transparent colour": used & transparent}
        groups["the others"] = used & ~odd & ~transparent
        for group, members in groups.items():
            rows = members[used]
            if rows.any():
                print(
                    f"{name}; {group}: {rows.sum()} images; pixels at most {pixel_difference[rows].max()}, equal in "
                    f"{(pixel_difference[rows] == 0).sum()}; features: median {np.median(difference[rows]):.1e}, worst "
                    f"{difference[rows].max():.1e} ({paths[np.flatnonzero(members)[difference[rows].argmax()]].name})"
                )


def readable(path: Path) -> bool:
    """True for file formats that torchvision decodes."""
    return path.suffix != ".bmp"


if __name__ == "__main__":
    command, folder = sys.argv[1], Path(sys.argv[2])
    make(folder, sys.argv[3] if len(sys.argv) > 3 else "runs/quickstart") if command == "make" else compare(folder)
