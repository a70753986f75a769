"""Reading and writing of safetensors: one file, or several with an index. The only module that knows the format."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from aimv2_jax.errors import UserError
from aimv2_jax.untrusted import is_inside, read_json_object

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
_DTYPES = ("F64", "F32", "F16", "BF16")
_MAX_NAME_LENGTH = 255  # Characters of a file name.


class Tensors:
    """The tensors of a file, or of a folder with `model.safetensors` or its index, read on demand.

    `shapes` comes from the files' headers.

    Raises:
      UserError: for a missing file, a damaged header, an index with missing entries, or a tensor that is not float.
    """

    def __init__(self, path: Path):
        self.shapes: dict[str, tuple[int, ...]] = {}
        self._file_of: dict[str, Path] = {}
        indexed = _indexed_files(path)
        for file in list(dict.fromkeys(indexed.values())) or [path / SINGLE if path.is_dir() else path]:
            if path.is_dir():
                check_inside(file, path)
            for name, shape in _header(file):
                self.shapes[name] = shape
                self._file_of[name] = file
        for name, file in indexed.items():
            if self._file_of.get(name) != file:
                raise UserError(f"{file} lacks a tensor that {path / INDEX} lists", name, "Copy the model again")

    def read(self, name: str) -> np.ndarray:
        """The tensor as float32; raises `UserError` if a value is not finite."""
        with _opened(self._file_of[name]) as file:
            tensor = np.asarray(file.get_tensor(name), np.float32)
        if not np.isfinite(tensor).all():
            what = f"{self._file_of[name]} has a tensor whose values are not all finite"
            raise UserError(what, name, "Give a model whose training did not diverge, or copy it again")
        return tensor


def _indexed_files(path: Path) -> dict[str, Path]:
    index = path / INDEX
    if not path.is_dir() or not index.is_file():
        return {}
    try:
        indexed = {str(name): str(file) for name, file in read_json_object(index)["weight_map"].items()}
    except (ValueError, KeyError, AttributeError) as error:
        raise UserError("not an index of safetensors files", str(index), "Copy the model again") from error
    for file in dict.fromkeys(indexed.values()):
        # The index came with the model and is untrusted: it may only name files in its own folder.
        invalid = len(file) > _MAX_NAME_LENGTH or "\0" in file
        if file != os.path.basename(file) or file in ("", ".", "..") or invalid:
            raise UserError(f"{index} lists a name that is not a file in its own folder", file, "Copy the model again")
        if not (path / file).is_file():
            raise UserError(f"a file that {index} lists is missing", str(path / file), "Copy the model again")
    return {name: path / file for name, file in indexed.items()}


def check_inside(file: Path, folder: Path) -> None:
    """Raises `UserError` for a link out of the folder, which could lead to any file of this machine."""
    if not is_inside(file, folder):
        what = f"a link in {folder} leads out of it"
        raise UserError(what, str(file), "Replace the link by the file, or give the path of its target")


def _header(path: Path) -> Iterator[tuple[str, tuple[int, ...]]]:
    with _opened(path) as file:
        for name in file.keys():  # noqa: SIM118
            tensor = file.get_slice(name)
            if tensor.get_dtype() not in _DTYPES:
                what = f"{path} has tensor {name} of an unsupported dtype"
                raise UserError(what, tensor.get_dtype(), f"Give {', '.join(_DTYPES)}")
            yield name, tuple(tensor.get_shape())


def _opened(path: Path) -> safe_open:
    if not path.is_file():
        raise UserError("no such safetensors file", str(path), "Give a .safetensors file, or a folder that has one")
    try:
        return safe_open(path, "np")
    except SafetensorError as error:
        remedy = f"Copy it again: {str(error).rstrip('.')}"
        raise UserError("not a complete safetensors file", str(path), remedy) from error


def write_tensors(
    folder: Path, tensors: Iterable[tuple[str, np.ndarray]], sizes: Mapping[str, int], max_bytes: float
) -> None:
    """Writes `model.safetensors`, or numbered files and an index if the tensors exceed `max_bytes`.

    `sizes` are the tensors' bytes by name. `tensors` come in the same order and are consumed one file at a time.
    """
    files: list[list[str]] = [[]]
    used = 0
    for name, size in sizes.items():
        if used and used + size > max_bytes:
            files.append([])
            used = 0
        files[-1].append(name)
        used += size
    count = len(files)
    titles = [SINGLE] if count == 1 else [f"model-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)]
    stream = iter(tensors)
    for title, names in zip(titles, files):
        part = dict(next(stream) for _ in names)
        assert list(part) == names, "tensors come in the order of their sizes"
        save_file(part, folder / title, metadata={"format": "pt"})  # `transformers` requires this metadata.
        (folder / title).chmod(0o666 & ~_umask())  # safetensors makes the file readable by its owner only.
    if count > 1:
        index = {
            "metadata": {"total_size": sum(sizes.values())},
            "weight_map": {name: title for title, names in zip(titles, files) for name in names},
        }
        (folder / INDEX).write_text(json.dumps(index, indent=1) + "\n", encoding="utf-8")


def _umask() -> int:
    mask = os.umask(0)  # The umask can only be read by setting it.
    os.umask(mask)
    return mask
