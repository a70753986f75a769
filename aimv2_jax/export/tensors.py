"""Tensors in safetensors files: one, or several that an index lists. The only module that knows the format."""

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
_KINDS = ("F64", "F32", "F16", "BF16")
_MAX_NAME = 255  # Characters of a file's name.


class Tensors:
    """The tensors of a file, or of a folder with `model.safetensors` or its index; read when asked.

    `shapes` is known from the files' headers.

    Raises:
      UserError: when there is none, a header is damaged, the index lists what isn't there, or a tensor has no floats.
    """

    def __init__(self, path: Path):
        self.shapes: dict[str, tuple[int, ...]] = {}
        self._file_of: dict[str, Path] = {}
        listed = _listed(path)
        for file in list(dict.fromkeys(listed.values())) or [path / SINGLE if path.is_dir() else path]:
            if path.is_dir():
                _check_inside(file, path)
            for name, shape in _header(file):
                self.shapes[name], self._file_of[name] = shape, file
        for name, file in listed.items():
            if self._file_of.get(name) != file:
                raise UserError(f"{file} lacks a tensor that {path / INDEX} lists", name, "Copy the model again")

    def read(self, name: str) -> np.ndarray:
        """The tensor as float32; raises `UserError` where it is not finite."""
        with _opened(self._file_of[name]) as file:
            tensor = np.asarray(file.get_tensor(name), np.float32)
        if not np.isfinite(tensor).all():
            what = f"{self._file_of[name]} has a tensor whose numbers are not all finite"
            raise UserError(what, name, "Give a model that was trained to its end, or copy it again")
        return tensor


def _listed(path: Path) -> dict[str, Path]:
    index = path / INDEX
    if not path.is_dir() or not index.is_file():
        return {}
    try:
        listed = {str(name): str(file) for name, file in read_json_object(index)["weight_map"].items()}
    except (ValueError, KeyError, AttributeError) as error:
        raise UserError("not an index of safetensors files", str(index), "Copy the model again") from error
    for file in dict.fromkeys(listed.values()):
        # The index came with the model, so it may name files of the model's folder and no others.
        if file != os.path.basename(file) or file in ("", ".", "..") or len(file) > _MAX_NAME or "\0" in file:
            raise UserError(f"{index} lists a file that is not the name of one beside it", file, "Copy the model again")
        if not (path / file).is_file():
            raise UserError(f"a file that {index} lists is missing", str(path / file), "Copy the model again")
    return {name: path / file for name, file in listed.items()}


def _check_inside(file: Path, folder: Path) -> None:
    """Refuses a link out of the folder, which may lead to any file of this machine."""
    if not is_inside(file, folder):
        what = f"a link in {folder} leads out of it"
        raise UserError(what, str(file), "Copy the file itself there, or give the path that it leads to")


def _header(path: Path) -> Iterator[tuple[str, tuple[int, ...]]]:
    with _opened(path) as file:
        for name in file.keys():  # noqa: SIM118
            tensor = file.get_slice(name)
            if tensor.get_dtype() not in _KINDS:
                kinds = ", ".join(_KINDS)
                raise UserError(
                    f"{path} has tensor {name} of a type that no parameter has", tensor.get_dtype(), f"Give {kinds}"
                )
            yield name, tuple(tensor.get_shape())


def _opened(path: Path) -> safe_open:
    if not path.is_file():
        raise UserError("no such safetensors file", str(path), "Give a .safetensors file, or a folder that has one")
    try:
        return safe_open(path, "np")
    except SafetensorError as error:
        remedy = f"Copy it again: {str(error).rstrip('.')}"
        raise UserError("not a whole safetensors file", str(path), remedy) from error


def write_tensors(folder: Path, tensors: Iterable[tuple[str, np.ndarray]], sizes: Mapping[str, int], most: int) -> None:
    """Writes `model.safetensors`; or numbered files and an index, where all are more than `most` bytes.

    `sizes` are those of the tensors in bytes, by name; `tensors` come in their order and are taken a file at a time.
    """
    files: list[list[str]] = [[]]
    used = 0
    for name, size in sizes.items():
        if used and used + size > most:
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
        save_file(part, folder / title, metadata={"format": "pt"})  # What `transformers` asks for.
        (folder / title).chmod(0o666 & ~_umask())  # safetensors makes it readable by its owner alone.
    if count > 1:
        index = {
            "metadata": {"total_size": sum(sizes.values())},
            "weight_map": {name: title for title, names in zip(titles, files) for name in names},
        }
        (folder / INDEX).write_text(json.dumps(index, indent=1) + "\n", encoding="utf-8")


def _umask() -> int:
    mask = os.umask(0)  # There is no way to read it but to set it.
    os.umask(mask)
    return mask
