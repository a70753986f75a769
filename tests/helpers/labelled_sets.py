"""Small labelled sets of real images, written as image folders, Hugging Face datasets and tables."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow
import pyarrow.parquet
from PIL import Image

from aimv2_jax.data import records
from aimv2_jax.data.sources import Source

LABEL = {"names": ["vehicle", "animal", "unicorn", "object"], "_type": "ClassLabel"}
"""A ClassLabel feature whose order is not the alphabet's, with a class that no image has."""
IMAGE = {"_type": "Image"}
STRUCT = pyarrow.struct([("bytes", pyarrow.binary()), ("path", pyarrow.string())])


class Example(NamedTuple):
    """An image of the bundled sample as its file's bytes, and its class."""

    name: str
    image: bytes
    label: str


def sample_images() -> list[Example]:
    """The images of the bundled sample that have one of the classes of `LABEL`."""
    source = Source("other", "package:data/sample/test/other")
    found = [records.decode(source.read(index)) for index in range(len(source))]
    labelled = [(f"{number:02}", record.image, record.labels["coarse"]) for number, record in enumerate(found)]
    return [Example(*example) for example in labelled if example[2] in LABEL["names"]]


def write_image_folder(folder: Path, examples: Sequence[Example]) -> None:
    """Writes FOLDER/LABEL/NAME.jpg."""
    for name, image, label in examples:
        (folder / label).mkdir(parents=True, exist_ok=True)
        (folder / label / f"{name}.jpg").write_bytes(image)


def table(features: Mapping[str, Any], columns: Mapping[str, Sequence[Any]]) -> pyarrow.Table:
    """A table with the metadata that Hugging Face's datasets write; images are given as bytes."""
    arrays = {
        name: pyarrow.array([value and {"bytes": value, "path": None} for value in values], STRUCT)
        if features.get(name) == IMAGE
        else pyarrow.array(values)
        for name, values in columns.items()
    }
    metadata = {"huggingface": json.dumps({"info": {"features": dict(features)}})}
    return pyarrow.table(arrays).replace_schema_metadata(metadata)


def save_to_disk(folder: Path, rows: pyarrow.Table, num_files: int = 1, batch_rows: int = 5) -> list[Path]:
    """Writes what `Dataset.save_to_disk` of datasets 5.2 writes, and returns the Arrow files."""
    folder.mkdir(parents=True)
    paths = [folder / f"data-{number:05d}-of-{num_files:05d}.arrow" for number in range(num_files)]
    size = -(-len(rows) // num_files)
    for number, path in enumerate(paths):
        with pyarrow.OSFile(str(path), "wb") as file, pyarrow.ipc.new_stream(file, rows.schema) as stream:
            stream.write_table(rows.slice(number * size, size), max_chunksize=batch_rows)
    state = {"_data_files": [{"filename": path.name} for path in paths], "_fingerprint": "0", "_split": None}
    (folder / "state.json").write_text(json.dumps(state, indent=2))
    (folder / "dataset_info.json").write_text(json.dumps({"citation": "", "features": {}}, indent=2))
    return paths


def hugging_face_rows(examples: Sequence[Example]) -> pyarrow.Table:
    """The examples as columns `image` and `label`."""
    labels = [LABEL["names"].index(example.label) for example in examples]
    columns = {"image": [example.image for example in examples], "label": labels}
    return table({"image": IMAGE, "label": LABEL}, columns)


def png(pixels: np.ndarray, mode: str | None = None) -> bytes:
    """The array as a PNG, converted to a mode of Pillow."""
    file = io.BytesIO()
    image = Image.fromarray(pixels)
    (image if mode is None else image.convert(mode)).save(file, "PNG")
    return file.getvalue()


def noise_map(image: bytes, bits: int = 8, seed: int = 0) -> np.ndarray:
    """Random values for each pixel of an encoded image."""
    width, height = Image.open(io.BytesIO(image)).size
    dtype = np.uint8 if bits == 8 else np.uint16
    return np.random.default_rng(seed).integers(0, 2**bits, (height, width), dtype)
