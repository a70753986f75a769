"""Compares the centre view with torchvision's: by the exported image processor, and by Resize and CenterCrop on Pillow.

Run by hand, never by pytest or CI: transformers takes its torchvision processor only where torchvision is, and that
wants an environment of its own (several GB). From the repository's root:

    .venv/bin/python tests/interop/compare_torchvision.py make DIR [SPEC]
    python3 -m venv OTHER && OTHER/bin/pip install -r tests/interop/requirements.txt
    OTHER/bin/python tests/interop/compare_torchvision.py compare DIR

`make` writes images, what `load_encoder` sees of each and its features, and an export of SPEC (runs/quickstart).
`compare` prints how far the others are from that: pixels in 1/255, features in units of their largest entry.

Found with the pinned versions, 100 images at 112 pixels, the quickstart's model after 20 steps:
- the processor, given what `load_image` gives: within 1 but for 5 of 3,763,200 numbers, which are off by 2 (torchvision
  rounds between its two passes, too); features: median 6.5e-4, worst 6.8e-3 of the largest entry;
- the processor, given paths: as that, but torchvision's decoder keeps a transparent colour that Pillow's way whitens;
- torchvision's `Resize` and `CenterCrop` on Pillow's images: equal but for those colours and where 3, 7, 11, ... pixels
  are cut in all (6 images of 100): `CenterCrop` rounds half to even, one pixel beside both processors; features there:
  median 0.16. With the cut rounded down, all images without a transparent colour are equal, byte for byte.
Apple's `val_transforms` of AIM v1 are these with another size: they resize to 8/7 of the side (256 for 224).
"""

import sys
from pathlib import Path

import numpy as np

COUNT = 100


def make(folder: Path, spec: str) -> None:
    sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parents[2])]
    from real_images import write_images

    from aimv2_jax import load_encoder
    from aimv2_jax.export import hf

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
    apple = transforms.Compose([transforms.Resize(size, transforms.InterpolationMode.BICUBIC)])
    cut = transforms.CenterCrop(size)

    def floor_cut(image: Image.Image) -> Image.Image:
        left, top = (image.width - size) // 2, (image.height - size) // 2
        return image.crop((left, top, left + size, top + size))

    loaded = [load_image(str(path)) for path in paths]
    resized = [apple(image.convert("RGB")) for image in loaded]
    odd = np.array([(max(image.size) - size) % 4 == 3 for image in resized])
    clear = np.array([image.info.get("transparency") is not None for image in loaded])  # Only the processor whitens.
    ways = {
        "processor, images by load_image": [np.asarray(processor(i, **steps)["pixel_values"][0]) for i in loaded],
        "processor, paths": [np.asarray(processor(str(p), **steps)["pixel_values"][0]) for p in paths if readable(p)],
        "Resize, CenterCrop": [np.asarray(cut(image)).transpose(2, 0, 1) for image in resized],
        "Resize, cut rounded down": [np.asarray(floor_cut(image)).transpose(2, 0, 1) for image in resized],
    }
    taken = np.array([readable(path) for path in paths])
    for name, theirs in ways.items():
        which = taken if name == "processor, paths" else np.ones(len(paths), bool)
        theirs = np.stack(theirs)
        off = np.abs(theirs.transpose(0, 2, 3, 1).astype(int) - pixels[which]).max((1, 2, 3))
        mean, std = (torch.tensor(value).view(3, 1, 1) for value in (processor.image_mean, processor.image_std))
        with torch.no_grad():
            found = model((torch.from_numpy(theirs) / 255 - mean) / std).last_hidden_state.numpy()
        apart = np.abs(found - features[which]).max((1, 2)) / np.abs(features[which]).max()
        groups = {"all": which, "cut rounded otherwise": which & odd, "a transparent colour": which & clear}
        groups["the others"] = which & ~odd & ~clear
        for group, members in groups.items():
            inside = members[which]
            if inside.any():
                print(
                    f"{name}; {group}: {inside.sum()} images; pixels at most {off[inside].max()}, equal in "
                    f"{(off[inside] == 0).sum()}; features: median {np.median(apart[inside]):.1e}, worst "
                    f"{apart[inside].max():.1e} ({paths[np.flatnonzero(members)[apart[inside].argmax()]].name})"
                )


def readable(path: Path) -> bool:
    """Whether torchvision decodes such a file."""
    return path.suffix != ".bmp"


if __name__ == "__main__":
    what, folder = sys.argv[1], Path(sys.argv[2])
    make(folder, sys.argv[3] if len(sys.argv) > 3 else "runs/quickstart") if what == "make" else compare(folder)
