"""What Hugging Face datasets on disk say of themselves: features, the files of a saved dataset, its splits.

`Dataset.save_to_disk` writes data-00000-of-00002.arrow, dataset_info.json and state.json, which names these files;
`DatasetDict.save_to_disk` writes dataset_dict.json, which names the splits, and such a folder for each. The features
are also in the metadata of every Arrow schema, in parquet files, too.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from aimv2_jax.errors import UserError
from aimv2_jax.prepare.inputs import open_files
from aimv2_jax.prepare.inputs.text_encoding import parse_object
from aimv2_jax.untrusted import parse_json_object

STATE_FILE, SPLITS_FILE = "state.json", "dataset_dict.json"
_METADATA_KEY = b"huggingface"
_MAX_CLASSES = 100_000


@dataclasses.dataclass(frozen=True)
class Features:
    """Columns of classes with the names of their classes in the order of their numbers, and columns of images."""

    classes: dict[str, tuple[str, ...]]
    images: tuple[str, ...]

    @classmethod
    def of(cls, schema: Any) -> Features:
        """The features of an Arrow schema; none if its metadata has none, or they are damaged."""
        try:
            tree = parse_json_object((schema.metadata or {}).get(_METADATA_KEY, b"{}"))
            features = {
                name: feature
                for name, feature in tree.get("info", {}).get("features", {}).items()
                if isinstance(feature, dict)
            }
        except (ValueError, AttributeError):
            features = {}
        classes = {name: _names(entry.get("names")) for name, entry in features.items() if _is(entry, "ClassLabel")}
        images = tuple(name for name, entry in features.items() if _is(entry, "Image"))
        return cls({name: names for name, names in classes.items() if names}, images)


def _is(feature: dict[str, Any], kind: str) -> bool:
    return feature.get("_type") == kind


def _names(names: Any) -> tuple[str, ...]:
    """Names of classes; () unless they are distinct texts, so that two classes never become one."""
    if not isinstance(names, list) or len(names) > _MAX_CLASSES:
        return ()
    is_text = all(isinstance(name, str) and name and name == name.encode("utf-8", "replace").decode() for name in names)
    return tuple(names) if is_text and len(set(names)) == len(names) else ()


def saved_files(folder: str, follow_links: bool) -> set[str] | None:
    """Names of the files of the dataset that `save_to_disk` wrote to `folder`; None if state.json names none."""
    tree = _read(folder, STATE_FILE, follow_links)
    entries = tree.get("_data_files")
    if not isinstance(entries, list):
        return None
    names = [entry.get("filename") for entry in entries if isinstance(entry, dict)]
    return {name for name in names if isinstance(name, str)}


def saved_splits(folder: str, follow_links: bool) -> list[str]:
    """Names of the splits of the DatasetDict in `folder`.

    Raises:
      UserError: if dataset_dict.json cannot be read.
    """
    splits = _read(folder, SPLITS_FILE, follow_links).get("splits")
    if not isinstance(splits, list) or not all(isinstance(name, str) and "/" not in name for name in splits):
        raise UserError(f"--input: {SPLITS_FILE} names no splits", folder, "Save the dataset again")
    return splits


def _read(folder: str, name: str, follow_links: bool) -> dict[str, Any]:
    try:
        return parse_object(open_files.read_beside(folder, name, follow_links)) or {}
    except open_files.FileUnavailable:
        return {}
