"""Labelled images of a prepared dataset. N images."""

from __future__ import annotations

import dataclasses
import hashlib
import zlib
from collections.abc import Collection, Sequence

import numpy as np
from jaxtyping import Int

from aimv2_jax.data import records
from aimv2_jax.data.class_counts import class_order
from aimv2_jax.data.records import BadRecord, Record
from aimv2_jax.data.sources import Source
from aimv2_jax.errors import UserError
from aimv2_jax.pretrained.images import NamedImage

_MAX_NAMED = 5  # Unknown classes that an error names.


@dataclasses.dataclass(frozen=True)
class LabelledDataset:
    """The records of a dataset that have `label`, by record index, class, and the value of a grouping label (or "").

    `content` identifies the dataset's bytes; `digest` also identifies the selected records.
    """

    source: Source
    label: str
    indices: Int[np.ndarray, " N"]
    classes: Int[np.ndarray, " N"]
    groups: tuple[str, ...]
    names: tuple[str, ...]
    content: str

    def __len__(self) -> int:
        return len(self.indices)

    @property
    def digest(self) -> str:
        content = hashlib.sha256(self.content.encode())
        content.update(np.ascontiguousarray(self.indices, dtype="<i8").tobytes())
        return content.hexdigest()[:16]

    def image(self, index: int) -> NamedImage:
        """The encoded image of example `index`."""
        _, record = read_record(self.source, int(self.indices[index]), self.source.name)
        return named_image(self.source, record)

    def take(self, indices: Int[np.ndarray, " M"]) -> LabelledDataset:
        """The examples at `indices`, in that order."""
        groups = tuple(self.groups[index] for index in indices)
        return dataclasses.replace(self, indices=self.indices[indices], classes=self.classes[indices], groups=groups)

    def with_classes(self, names: Sequence[str]) -> LabelledDataset:
        """The same examples with classes in the order of `names`, which may have more than there are now."""
        class_of = {name: index for index, name in enumerate(names)}
        new_ids = np.array([class_of[name] for name in self.names])
        return dataclasses.replace(self, classes=new_ids[self.classes], names=tuple(names))


def read_labelled_dataset(
    path: str,
    flag: str,
    label: str,
    by: str | None,
    without: Collection[str],
    names: Sequence[str] | None = None,
    exclude: str = "--without",
) -> LabelledDataset:
    """Reads the labelled images of a prepared dataset.

    Args:
      path: the dataset's folder.
      flag: the flag that named it, for error messages.
      label: the label whose values are the classes; records without it, or with one of `without`, are excluded.
      by: another label, which groups the results.
      without: excluded values of `label`.
      names: the classes in the train dataset's order, by which those of this dataset are matched; by default those that
        the records have, in the order of their numbers (`DatasetInfo.classes`).
      exclude: what excludes a value of `label`, for error messages.

    Raises:
      UserError: for a missing dataset or label, fewer than two classes, or a class that `names` lacks.
    """
    source = Source(path, path, flag)
    indices, values, groups = [], [], []
    seen: set[str] = set()
    checksum = 0
    for index in range(len(source)):
        data, record = read_record(source, index, path)
        checksum = zlib.crc32(data, checksum)
        labels = record.labels
        seen |= labels.keys()
        value = labels.get(label)
        if value is None or value in without:
            continue
        if by is not None and by not in labels:
            raise UserError(f"{flag}: a record has no label for --by", by, f"It has {', '.join(labels) or 'none'}")
        indices.append(index)
        values.append(value)
        groups.append(labels[by] if by else "")
    if not indices:
        remedy = f"Its labels are {', '.join(sorted(seen))}" if seen else "Prepare it with --label NAME=FIELD"
        raise UserError(f"{flag} {path} has no record with this label", label, remedy)
    classes = _ordered_classes(source, label, set(values)) if names is None else tuple(names)
    unknown = class_order(set(values) - set(classes))
    if unknown:
        count = sum(value in unknown for value in values)
        what = f"{flag} {path} has {count:,} records with a {label} that --train lacks"
        more = f" and {len(unknown) - _MAX_NAMED:,} more" if len(unknown) > _MAX_NAMED else ""
        raise UserError(what, ", ".join(unknown[:_MAX_NAMED]) + more, f"Exclude them with {exclude}")
    if len(classes) < 2:
        raise UserError(f"{flag} {path} has only one {label}", classes[0], "Give a label with several values")
    class_of = {name: index for index, name in enumerate(classes)}
    class_ids = np.array([class_of[value] for value in values])
    return LabelledDataset(
        source, label, np.array(indices), class_ids, tuple(groups), classes, f"{len(source)}:{checksum}"
    )


def _ordered_classes(source: Source, label: str, values: set[str]) -> tuple[str, ...]:
    listed = [name for name in source.info.classes.get(label, ()) if name in values]
    return (*listed, *class_order(values.difference(listed)))


def split(
    dataset: LabelledDataset, share: float | None, seed: int
) -> tuple[Int[np.ndarray, " F"], Int[np.ndarray, " V"]]:
    """Stratified split into sorted indices (fit_idx, val_idx), deterministic in `seed`.

    The second part has `share` of every class with two or more examples; it is empty if `share` is None.

    Raises:
      UserError: if no class has two examples.
    """
    if share is None:
        return np.arange(len(dataset)), np.arange(0)
    rng = np.random.default_rng(seed)
    val_idx: list[int] = []
    for class_id in range(len(dataset.names)):
        members = rng.permutation(np.flatnonzero(dataset.classes == class_id))
        count = max(1, min(round(share * len(members)), len(members) - 1)) if len(members) > 1 else 0
        val_idx += members[:count].tolist()
    if not val_idx:
        what = "the train dataset has too few images of each class for a validation split"
        raise UserError(what, len(dataset), "Give a larger dataset")
    fit_idx = np.setdiff1d(np.arange(len(dataset)), val_idx)
    return fit_idx, np.sort(val_idx)


def read_record(source: Source, index: int, name: str) -> tuple[bytes, Record]:
    """The bytes and the content of record `index`; raises a `UserError` about `name` if it is unreadable."""
    try:
        data = source.read(index)
        return data, records.decode(data)
    except BadRecord as error:
        raise UserError(f"{name} has an unreadable record", index, "Prepare the dataset again") from error


def named_image(source: Source, record: Record) -> NamedImage:
    """The encoded image of a record, named by the record's source and key."""
    return NamedImage(f"{source.name}: {record.key}", record.image)
