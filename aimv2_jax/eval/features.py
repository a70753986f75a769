"""Writes dense image features for other programs.

    python -m aimv2_jax.eval.features --checkpoint SPEC --input photos --output features.array_record
    python -m aimv2_jax.eval.features --checkpoint SPEC --input data/web --output features --layer 18 --image-size 448

--input is a folder of images or a prepared dataset. --output is a new folder, which gets one NAME.npz per image with
`features` [h, w, width] and `layer`; or a file that ends in .array_record, with one record per image: msgpack of
{name, shape, dtype, layer, features}, the last as bytes in C order. --pca FILE.png draws the first images beside
their features: the three principal components of all their patches as red, green and blue.

SPEC is a run (WORKDIR, WORKDIR:STEP, WORKDIR:last), an export, a Hugging Face folder or a .safetensors file.
N images, h and w patches, D width.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import itertools
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import msgpack
import numpy as np
from array_record.python.array_record_module import ArrayRecordWriter
from jaxtyping import Float, UInt8
from matplotlib.figure import Figure
from tqdm import tqdm

from aimv2_jax.allocator import keep_freed_memory
from aimv2_jax.cli import Parser, check_output, make_output_folder, positive
from aimv2_jax.data.dataset_info import DATASET_FILE
from aimv2_jax.data.sources import Source
from aimv2_jax.data.transforms.decode import FORMAT_OF
from aimv2_jax.errors import EXIT_FINISHED, UserError, cli_main
from aimv2_jax.eval.cli import add_encoder, check_files, check_layer
from aimv2_jax.eval.plots import image_grid
from aimv2_jax.eval.probes.dataset import named_image, read_record
from aimv2_jax.platforms import skip_absent_tpu
from aimv2_jax.pretrained.encoder import PretrainedEncoder, encoder_of
from aimv2_jax.pretrained.images import ImageLike
from aimv2_jax.pretrained.source import open_weights

_RECORDS_SUFFIX = ".array_record"
_MAX_NAME_BYTES = 255  # Limit of common file systems for one file name.
_PCA_IMAGES = 8  # Images drawn by --pca.
_PCA_COLUMNS = 4  # Pairs of image and features side by side.

Features = Float[np.ndarray, "h w D"]


def named_images(folder: Path) -> tuple[int, Iterator[tuple[str, ImageLike]]]:
    """The number of images, and (name, image) of each file of a folder or record of a prepared dataset, in order.

    Raises:
      UserError: for a missing folder, or one without images.
    """
    if (folder / DATASET_FILE).is_file():
        source = Source("input", str(folder), "--input")
        return len(source), _record_images(source)
    if not folder.is_dir():
        raise UserError("--input: no such folder", str(folder), "Give a folder of images or a prepared dataset")
    files = [path for path in sorted(folder.rglob("*")) if FORMAT_OF.get(path.suffix[1:].lower())]
    if not files:
        suffixes = ", ".join(suffix for suffix, image_format in FORMAT_OF.items() if image_format)
        remedy = f"Give a folder with files that end in {suffixes}"
        raise UserError("--input: no images in this folder", str(folder), remedy)
    return len(files), ((name, path) for name, path in zip(_names(files, folder), files))


def _names(files: Sequence[Path], folder: Path) -> list[str]:
    """Relative paths without suffix, or with it if files differ only in their suffix."""
    stems = [str(path.relative_to(folder).with_suffix("")) for path in files]
    count = collections.Counter(stems)
    return [stem if count[stem] == 1 else str(path.relative_to(folder)) for stem, path in zip(stems, files)]


def _record_images(source: Source) -> Iterator[tuple[str, ImageLike]]:
    for index in range(len(source)):
        _, record = read_record(source, index, "--input")
        yield record.key, named_image(source, record)


def dense_features(
    encoder: PretrainedEncoder, images: Iterator[tuple[str, ImageLike]], layer: int | None, batch_size: int
) -> Iterator[tuple[str, UInt8[np.ndarray, "H W 3"], Features]]:
    """Yields (name, image as the encoder sees it, features) of each image."""
    while chunk := list(itertools.islice(images, batch_size)):
        pixels = [encoder.pixels(image) for _, image in chunk]
        batch, grids = encoder.batch(pixels, batch_size)
        features = np.asarray(encoder.features(**batch, layer=layer))
        for (name, _), image_pixels, row, (h, w) in zip(chunk, pixels, features, grids):
            yield name, image_pixels, row[: h * w].reshape(h, w, -1)


def principal_colors(maps: Sequence[Features]) -> list[UInt8[np.ndarray, "h w 3"]]:
    """The three principal components of all patches as red, green and blue, scaled by their 1st and 99th percentile."""
    patches = np.concatenate([features.reshape(-1, features.shape[-1]) for features in maps]).astype(np.float64)
    mean = patches.mean(axis=0)
    _, axes = np.linalg.eigh(np.cov(patches - mean, rowvar=False))
    components = axes[:, :-4:-1]
    # An eigenvector's sign is arbitrary, so its largest entry is made positive.
    components *= np.sign(components[np.abs(components).argmax(axis=0), range(components.shape[1])])
    low, high = np.percentile((patches - mean) @ components, (1, 99), axis=0)
    scale = np.maximum(high - low, 1e-12)
    scaled = [((features.astype(np.float64) - mean) @ components - low) / scale for features in maps]
    return [(255 * color.clip(0, 1)).astype(np.uint8) for color in scaled]


def pca_figure(images: Sequence[np.ndarray], maps: Sequence[Features], heading: str, patch_size: int) -> Figure:
    """Each image as the encoder sees it, beside the principal components of its patches as colours."""
    colors = [color.repeat(patch_size, axis=0).repeat(patch_size, axis=1) for color in principal_colors(maps)]
    note = "Right of each: the three principal components of the features of all patches here, as red, green and blue."
    pairs = [
        ("", {"image": images[index::_PCA_COLUMNS], "features": colors[index::_PCA_COLUMNS]})
        for index in range(min(_PCA_COLUMNS, len(images)))
    ]
    return image_grid(pairs, heading, note)


class _FolderWriter:
    """Writes one NAME.npz per image; a name may contain folders."""

    def __init__(self, path: Path):
        self._path = path
        make_output_folder(path)
        if any(path.iterdir()):
            raise UserError("--output is not empty", str(path), "Give a new folder")

    def __call__(self, name: str, features: Features, layer: int | None) -> None:
        remedy = f"Name an --output that ends in {_RECORDS_SUFFIX}"
        parts = Path(f"{name}.npz").parts
        if not name or "\0" in name or any(len(part.encode(errors="replace")) > _MAX_NAME_BYTES for part in parts):
            raise UserError("a record's key is not a valid file name", name, remedy)
        if Path(name).is_absolute() or ".." in parts:
            raise UserError("a record's key leads out of --output", name, remedy)
        file = self._path.joinpath(*parts)
        # A name may also collide with a folder: "a" and "a.npz/b".
        if file.exists() or any(parent.is_file() for parent in file.parents):
            raise UserError("two images have the same name", name, f"Rename one; or n{remedy[1:]}")
        file.parent.mkdir(parents=True, exist_ok=True)
        np.savez(file, features=features, layer=-1 if layer is None else layer)

    def close(self) -> None:
        pass


class _RecordWriter:
    """Writes one record per image to one file."""

    def __init__(self, path: Path):
        check_output(path, _RECORDS_SUFFIX)
        if path.exists():
            raise UserError("--output exists already", str(path), "Name a new file")
        self._writer = ArrayRecordWriter(str(path), "group_size:1")

    def __call__(self, name: str, features: Features, layer: int | None) -> None:
        tree = {"name": name, "shape": list(features.shape), "dtype": str(features.dtype), "layer": layer}
        self._writer.write(msgpack.packb(tree | {"features": np.ascontiguousarray(features).tobytes()}))

    def close(self) -> None:
        self._writer.close()


def parse_arguments(arguments: Sequence[str]) -> argparse.Namespace:
    """Parses and checks the command line."""
    summary, _, epilog = __doc__.partition("\n\n")
    parser = Parser(prog="python -m aimv2_jax.eval.features", description=summary, epilog=epilog)
    add_encoder(parser)
    add = parser.add_argument
    add("--input", required=True, type=Path, metavar="DIR", help="folder of images, or a prepared dataset")
    add("--output", required=True, type=Path, metavar="PATH", help="a new folder, or a new file.array_record")
    add("--batch-size", type=positive, metavar="N", help="images per batch (default: 32 of 256 patches)")
    add("--pca", type=Path, metavar="FILE.png", help=f"draw the first {_PCA_IMAGES} images and their features")
    return parser.parse_args(arguments)


@cli_main
def main(arguments: Sequence[str] | None = None) -> int:
    skip_absent_tpu()
    keep_freed_memory()
    flags = parse_arguments(sys.argv[1:] if arguments is None else arguments)
    count, images = named_images(flags.input)
    check_files(pca=flags.pca)
    weights = open_weights(flags.checkpoint, flags.heads, flags.weights)
    print(weights.pixel_statistics())
    encoder = encoder_of(weights, flags.dtype, flags.image_size, flags.area)
    depth = encoder.spec.depth
    check_layer(flags.layer, depth)
    to_records = flags.output.name.endswith(_RECORDS_SUFFIX)
    write = _RecordWriter(flags.output) if to_records else _FolderWriter(flags.output)
    drawn: list[tuple[np.ndarray, Features]] = []
    stream = dense_features(encoder, images, flags.layer, flags.batch_size or encoder.batch_size)
    with contextlib.closing(write):
        for name, pixels, features in tqdm(stream, total=count, unit="image"):
            features = features.astype(np.float32)
            write(name, features, flags.layer)
            if len(drawn) < _PCA_IMAGES:
                drawn.append((pixels, features))
    if flags.pca is not None:
        drawn_pixels, maps = zip(*drawn)
        layer_title = "after the final norm" if flags.layer is None else f"after block {flags.layer} of {depth}"
        figure = pca_figure(drawn_pixels, maps, f"Features {layer_title}", encoder.spec.patch_size)
        figure.savefig(flags.pca, dpi=110)
        print(flags.pca)
    print(f"wrote features of {count:,} images to {flags.output}")
    return EXIT_FINISHED


if __name__ == "__main__":
    sys.exit(main())
