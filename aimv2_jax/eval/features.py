"""Dense features of pictures, for other programs.

    python -m aimv2_jax.eval.features --checkpoint SPEC --input photos --output features.array_record
    python -m aimv2_jax.eval.features --checkpoint SPEC --input data/web --output features --layer 18 --image-size 448

--input is a folder of pictures or a prepared data set. --output is a new folder, which gets a NAME.npz a picture with
`features` [h, w, width] and `layer`; or a file that ends in .array_record, with a record a picture: msgpack of
{name, shape, dtype, layer, features}, the last as bytes in C order. --pca FILE.png draws the first pictures beside
their features: the three main directions of all their patches as red, green and blue.

SPEC is a run (WORKDIR, WORKDIR:STEP, WORKDIR:last), an export, a folder of Hugging Face's or a .safetensors file.
N pictures, h and w patches, D width.
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
from aimv2_jax.data import records
from aimv2_jax.data.datasets import DATASET_FILE
from aimv2_jax.data.pictures import FORMAT_OF
from aimv2_jax.data.records import BadRecord
from aimv2_jax.data.sources import Source
from aimv2_jax.errors import EXIT_FINISHED, UserError, reports_user_errors
from aimv2_jax.eval.arguments import add_encoder, check_layer
from aimv2_jax.eval.encoders import LoadedEncoder, load_encoder
from aimv2_jax.eval.figures import Column, picture_grid
from aimv2_jax.eval.images import ImageLike, NamedPicture
from aimv2_jax.flags import Parser, check_output, make_output_folder, positive
from aimv2_jax.platforms import skip_absent_tpu

_RECORDS = ".array_record"
_MAX_NAME = 255  # Bytes of a file's name.
_DRAWN, _PAIRS = 8, 4  # Pictures of --pca, and how many side by side.

Features = Float[np.ndarray, "h w D"]


def named_pictures(folder: Path) -> tuple[int, Iterator[tuple[str, ImageLike]]]:
    """How many, and (name, picture) of each of a folder's files or of a prepared data set's records, in order.

    Raises:
      UserError: where there is no folder, or no picture in it.
    """
    if (folder / DATASET_FILE).is_file():
        source = Source("input", str(folder), "--input")
        return len(source), _of_records(source)
    if not folder.is_dir():
        raise UserError("--input: no such folder", str(folder), "Give a folder of pictures or a prepared data set")
    files = [path for path in sorted(folder.rglob("*")) if FORMAT_OF.get(path.suffix[1:].lower())]
    if not files:
        endings = ", ".join(ending for ending, kind in FORMAT_OF.items() if kind)
        raise UserError(
            "--input: no pictures in this folder", str(folder), f"Give one with files that end in {endings}"
        )
    return len(files), ((name, path) for name, path in zip(_names(files, folder), files))


def _names(files: Sequence[Path], folder: Path) -> list[str]:
    """Each file's without its ending, but where several differ by that alone."""
    short = [str(path.relative_to(folder).with_suffix("")) for path in files]
    count = collections.Counter(short)
    return [name if count[name] == 1 else str(path.relative_to(folder)) for name, path in zip(short, files)]


def _of_records(source: Source) -> Iterator[tuple[str, ImageLike]]:
    for index in range(len(source)):
        try:
            record = records.decode(source.read(index))
        except BadRecord as error:
            raise UserError("--input has a record that cannot be read", index, "Prepare the data set again") from error
        yield record.key, NamedPicture(f"{source.name}: {record.key}", record.image)


def dense_features(
    encoder: LoadedEncoder, pictures: Iterator[tuple[str, ImageLike]], layer: int | None, batch_size: int
) -> Iterator[tuple[str, UInt8[np.ndarray, "H W 3"], Features]]:
    """(name, the picture as the encoder saw it, its features) of each."""
    while chunk := list(itertools.islice(pictures, batch_size)):
        pixels = [encoder.pixels(picture) for _, picture in chunk]
        batch, grids = encoder.batch(pixels, batch_size)
        features = np.asarray(encoder.features(**batch, layer=layer))
        for (name, _), seen, row, (h, w) in zip(chunk, pixels, features, grids):
            yield name, seen, row[: h * w].reshape(h, w, -1)


def principal_colors(maps: Sequence[Features]) -> list[UInt8[np.ndarray, "h w 3"]]:
    """The three main directions of all patches together as red, green and blue, from their 1st to 99th percentile."""
    patches = np.concatenate([one.reshape(-1, one.shape[-1]) for one in maps]).astype(np.float64)
    mean = patches.mean(axis=0)
    _, axes = np.linalg.eigh(np.cov(patches - mean, rowvar=False))
    main = axes[:, :-4:-1]
    main *= np.sign(main[np.abs(main).argmax(axis=0), range(main.shape[1])])  # A direction's sign is nobody's choice.
    low, high = np.percentile((patches - mean) @ main, (1, 99), axis=0)
    scaled = [((one.astype(np.float64) - mean) @ main - low) / np.maximum(high - low, 1e-12) for one in maps]
    return [(255 * one.clip(0, 1)).astype(np.uint8) for one in scaled]


def pca_figure(pictures: Sequence[np.ndarray], maps: Sequence[Features], heading: str, patch_size: int) -> Figure:
    """Each picture as the encoder saw it, and beside it its patches' main directions as colours."""
    colors = [one.repeat(patch_size, axis=0).repeat(patch_size, axis=1) for one in principal_colors(maps)]
    note = "Right of each: the three main directions of the features of all patches here, as red, green and blue."
    columns = [
        Column(" " * turn, title, ones[turn::_PAIRS])  # Groups without a name, each another.
        for turn in range(min(_PAIRS, len(pictures)))
        for title, ones in (("picture", list(pictures)), ("features", colors))
    ]
    return picture_grid(columns, heading, note)


class _Folder:
    """A NAME.npz a picture; names may have folders in them."""

    def __init__(self, path: Path):
        self._path = path
        make_output_folder(path)
        if any(path.iterdir()):
            raise UserError("--output is not empty", str(path), "Give a new folder")

    def __call__(self, name: str, features: Features, layer: int | None) -> None:
        remedy = f"Name an --output that ends in {_RECORDS}"
        parts = Path(f"{name}.npz").parts
        if not name or "\0" in name or any(len(part.encode(errors="replace")) > _MAX_NAME for part in parts):
            raise UserError("a record's key cannot be the name of a file", name, remedy)
        if Path(name).is_absolute() or ".." in parts:
            raise UserError("a record's key would lead out of --output", name, remedy)
        file = self._path.joinpath(*parts)
        # As a folder's, too: "a" and "a.npz/b".
        if file.exists() or any(parent.is_file() for parent in file.parents):
            raise UserError("two pictures have one name", name, f"Rename one; or n{remedy[1:]}")
        file.parent.mkdir(parents=True, exist_ok=True)
        np.savez(file, features=features, layer=-1 if layer is None else layer)

    def close(self) -> None:
        pass


class _Records:
    """A record a picture in one file."""

    def __init__(self, path: Path):
        check_output(path, _RECORDS)
        if path.exists():
            raise UserError("--output is there already", str(path), "Name a new file")
        self._writer = ArrayRecordWriter(str(path), "group_size:1")

    def __call__(self, name: str, features: Features, layer: int | None) -> None:
        tree = {"name": name, "shape": list(features.shape), "dtype": str(features.dtype), "layer": layer}
        self._writer.write(msgpack.packb(tree | {"features": np.ascontiguousarray(features).tobytes()}))

    def close(self) -> None:
        self._writer.close()


def parse_arguments(arguments: Sequence[str]) -> argparse.Namespace:
    """The checked flags of a command line."""
    summary, _, epilog = __doc__.partition("\n\n")
    parser = Parser(prog="python -m aimv2_jax.eval.features", description=summary, epilog=epilog)
    add_encoder(parser)
    add = parser.add_argument
    add("--input", required=True, type=Path, metavar="DIR", help="pictures, or a prepared data set")
    add("--output", required=True, type=Path, metavar="PATH", help="a new folder, or a new file.array_record")
    add("--batch-size", type=positive, metavar="N", help="pictures at a time (default: 32 of 256 patches)")
    add("--pca", type=Path, metavar="FILE.png", help=f"draws the first {_DRAWN} pictures and their features")
    return parser.parse_args(arguments)


@reports_user_errors
def main(arguments: Sequence[str] | None = None) -> int:
    skip_absent_tpu()
    keep_freed_memory()
    flags = parse_arguments(sys.argv[1:] if arguments is None else arguments)
    count, pictures = named_pictures(flags.input)
    if flags.pca is not None:
        check_output(flags.pca, ".png", "--pca")
    encoder = load_encoder(
        flags.checkpoint, flags.dtype, flags.image_size, flags.area, flags.heads, weights=flags.weights
    )
    depth = encoder.vision.depth
    check_layer(flags.layer, depth)
    write = _Records(flags.output) if flags.output.name.endswith(_RECORDS) else _Folder(flags.output)
    drawn: list[tuple[np.ndarray, Features]] = []
    found = dense_features(encoder, pictures, flags.layer, flags.batch_size or encoder.batch_size)
    with contextlib.closing(write):
        for name, seen, features in tqdm(found, total=count, unit="picture"):
            features = features.astype(np.float32)
            write(name, features, flags.layer)
            if len(drawn) < _DRAWN:
                drawn.append((seen, features))
    if flags.pca is not None:
        seen, maps = zip(*drawn)
        where = "after the final norm" if flags.layer is None else f"after block {flags.layer} of {depth}"
        figure = pca_figure(seen, maps, f"Features {where}", encoder.vision.patch_size)
        figure.savefig(flags.pca, dpi=110)
        print(flags.pca)
    print(f"wrote {count:,} pictures' features to {flags.output}")
    return EXIT_FINISHED


if __name__ == "__main__":
    sys.exit(main())
