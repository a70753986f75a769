"""Labelled pictures of a prepared data set. N pictures."""

from __future__ import annotations

import dataclasses
import hashlib
import zlib
from collections.abc import Collection, Sequence

import numpy as np
from jaxtyping import Int

from aimv2_jax.data import records
from aimv2_jax.data.records import BadRecord, Record
from aimv2_jax.data.sources import Source
from aimv2_jax.errors import UserError
from aimv2_jax.eval.images import NamedPicture


@dataclasses.dataclass(frozen=True)
class Examples:
    """The records of a set that have a label: where they lie, their class, and the value of another label, or "".

    `content` tells which bytes the set has, `digest` besides which of its records these are.
    """

    source: Source
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

    def image(self, place: int) -> NamedPicture:
        """The encoded picture of example `place`."""
        _, record = _read(self.source, int(self.indices[place]))
        return NamedPicture(f"{self.source.name}: {record.key}", record.image)

    def take(self, places: Int[np.ndarray, " M"]) -> Examples:
        """Those at `places`, in that order."""
        groups = tuple(self.groups[place] for place in places)
        return dataclasses.replace(self, indices=self.indices[places], classes=self.classes[places], groups=groups)


def read_examples(
    path: str, flag: str, label: str, by: str | None, without: Collection[str], names: Sequence[str] | None = None
) -> Examples:
    """The pictures of a prepared set with their classes.

    Args:
      path: the set's folder.
      flag: what it was given by, for errors.
      label: the label whose values are the classes; records without it, or with one of `without`, are left out.
      by: another label, by which results are told apart.
      without: values of `label`.
      names: the classes in order, of the train set; by default the values that are found, sorted.

    Raises:
      UserError: for no such set or label, fewer than two classes, or a class that `names` lacks.
    """
    source = Source(path, path, flag)
    indices, values, groups = [], [], []
    seen: set[str] = set()
    checksum = 0
    for index in range(len(source)):
        data, record = _read(source, index)
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
    classes = tuple(sorted(set(values))) if names is None else tuple(names)
    unknown = sorted(set(values) - set(classes))
    if unknown:
        raise UserError(f"{flag} {path} has a {label} that --train lacks", unknown[0], "Leave it out by --without")
    if len(classes) < 2:
        raise UserError(f"{flag} {path} has one {label} alone", classes[0], "Give a label with several values")
    number = {name: place for place, name in enumerate(classes)}
    numbers = np.array([number[value] for value in values])
    return Examples(source, np.array(indices), numbers, tuple(groups), classes, f"{len(source)}:{checksum}")


def split(examples: Examples, share: float, seed: int) -> tuple[Int[np.ndarray, " F"], Int[np.ndarray, " V"]]:
    """Places of two parts, the second with `share` of every class of two or more; the same for the same seed."""
    rng = np.random.default_rng(seed)
    held: list[int] = []
    for number in range(len(examples.names)):
        places = rng.permutation(np.flatnonzero(examples.classes == number))
        held += places[: max(1, min(round(share * len(places)), len(places) - 1)) if len(places) > 1 else 0].tolist()
    kept = np.setdiff1d(np.arange(len(examples)), held)
    return kept, np.sort(held)


def _read(source: Source, index: int) -> tuple[bytes, Record]:
    """A record, and its bytes."""
    try:
        data = source.read(index)
        return data, records.decode(data)
    except BadRecord as error:
        raise UserError(f"{source.name} has a record that cannot be read", index, "Prepare the set again") from error
