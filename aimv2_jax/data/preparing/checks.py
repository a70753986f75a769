"""What a sample must be to become a record, and for which reason it does not."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from aimv2_jax.data import captions
from aimv2_jax.data.inputs.samples import Sample
from aimv2_jax.data.pictures import decode_image, image_size
from aimv2_jax.data.records import BadRecord, Record, bounded_key

MOST_LETTERS = captions.MAX_LETTERS  # Of a caption or label.
MOST_CAPTIONS = 100  # Of one kind in a record.
_DIGESTS = {32: hashlib.md5, 64: hashlib.sha256}  # By the letters of their hexadecimal.


@dataclasses.dataclass(frozen=True)
class Rules:
    """What is asked of every sample: sides in pixels, `max_aspect` of the longer side over the shorter.

    `captions` map a kind to a field, or to several whose captions are all of that kind; a field may hold a text or a
    list of texts. `labels` map a name to a field; `keep` maps a field to the values that are taken; `verify`
    is a field with a digest of the picture's bytes; `decode` asks that all pixels can be decoded.
    """

    captions: Mapping[str, str | Sequence[str]] = dataclasses.field(default_factory=dict)
    labels: Mapping[str, str] = dataclasses.field(default_factory=dict)
    keep: Mapping[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)
    min_side: int = 32
    max_side: int | None = None
    max_aspect: float = 20.0
    verify: str | None = None
    decode: bool = False

    @property
    def fields(self) -> tuple[str, ...]:
        """All fields that the rules name."""
        verify = [] if self.verify is None else [self.verify]
        captions = itertools.chain.from_iterable(map(fields_of_kind, self.captions.values()))
        return tuple(dict.fromkeys([*captions, *self.labels.values(), *self.keep, *verify]))


def fields_of_kind(fields: str | Sequence[str]) -> list[str]:
    """The fields of a caption kind in `Rules.captions` as a list, however many they are."""
    return [fields] if isinstance(fields, str) else list(fields)


class Dropped(Exception):
    """The sample is left out, for `reason`."""

    def __init__(self, reason: str):
        self.reason = reason
        super().__init__(reason)


@dataclasses.dataclass(frozen=True)
class Checked:
    """A record, its picture's (width, height), and in what its texts are not those of the sample."""

    record: Record
    size: tuple[int, int]
    changes: tuple[str, ...]


def check(sample: Sample, rules: Rules) -> Checked:
    """The sample's record; captions as they were, since the pipeline cleans them.

    Raises:
      Dropped: if it is not to be one.
    """
    for field, values in rules.keep.items():
        if _shown(sample.fields.get(field)) not in values:
            raise Dropped("not_kept")
    if sample.image is None:
        raise Dropped(sample.absence)
    if rules.verify is not None:
        _verify(sample.image, sample.fields.get(rules.verify))
    size = _checked_size(sample.image, rules)
    texts, changes = _captions(sample, rules.captions)
    labels, label_changes = _labels(sample, rules.labels)
    if rules.decode:
        try:
            decode_image(sample.image)
        except BadRecord as error:
            raise Dropped(error.reason) from error
    key = sample.key.encode("utf-8", "backslashreplace").decode()  # File names may be any bytes.
    return Checked(
        Record(bounded_key(key), sample.image, texts, labels), size, tuple(dict.fromkeys(changes + label_changes))
    )


def _verify(image: bytes, digest: Any) -> None:
    expected = (_shown(digest) or "").strip().lower()
    if len(expected) not in _DIGESTS:
        raise Dropped("checksum_missing")
    if _DIGESTS[len(expected)](image).hexdigest() != expected:
        raise Dropped("checksum_mismatch")


def _checked_size(image: bytes, rules: Rules) -> tuple[int, int]:
    try:
        size = image_size(image)
    except BadRecord as error:
        raise Dropped(error.reason) from error
    if min(size) < rules.min_side:
        raise Dropped("too_small")
    if rules.max_side is not None and max(size) > rules.max_side:
        raise Dropped("too_large")
    if max(size) > rules.max_aspect * min(size):
        raise Dropped("too_elongated")
    return size


def _captions(
    sample: Sample, fields: Mapping[str, str | Sequence[str]]
) -> tuple[dict[str, str | list[str]], list[str]]:
    found: dict[str, str | list[str]] = {}
    changes: list[str] = []
    for kind, names in fields.items():
        values = [value for name in fields_of_kind(names) for value in _values(sample.fields.get(name))]
        if len(values) > MOST_CAPTIONS:
            changes.append("captions_left_out")
        texts = list(_usable(values[:MOST_CAPTIONS], changes))
        if texts:
            found[kind] = texts[0] if len(texts) == 1 else texts
    if not found:
        raise Dropped("caption_not_text" if "caption_not_text" in changes else "no_caption")
    return found, changes


def _values(field: Any) -> Sequence[Any]:
    return field if isinstance(field, (list, tuple)) else [field]


def _usable(values: Sequence[Any], changes: list[str]) -> Iterator[str]:
    """The captions among `values`; `changes` gets what was done to others."""
    for value in values:
        try:
            text = text_of(value)
        except ValueError:
            changes.append("caption_not_text")
            continue
        if text is None:
            continue
        cut = text[:MOST_LETTERS]
        try:
            captions.clean(cut)
        except BadRecord:
            continue
        if cut != text:
            changes.append("caption_cut")
        yield cut


def _labels(sample: Sample, fields: Mapping[str, str]) -> tuple[dict[str, str], list[str]]:
    labels, changes = {}, []
    for name, field in fields.items():
        try:
            text = text_of(sample.fields.get(field))
        except ValueError:
            changes.append("label_not_text")
            continue
        if text:
            labels[name] = text[:MOST_LETTERS]
            if labels[name] != text:
                changes.append("label_cut")
    return labels, changes


def text_of(value: Any) -> str | None:
    """A field's value as text, None where there is none; raises `ValueError` for what is no text in UTF-8."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return None
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, (int, float)):
        return str(value)
    if isinstance(value, bytes):
        return value.decode("utf-8")
    if isinstance(value, str):
        value.encode("utf-8")  # JSON can hold half a surrogate pair.
        return value
    raise ValueError(f"a {type(value).__name__}")


def _shown(value: Any) -> str | None:
    try:
        return text_of(value)
    except ValueError:
        return None
