"""Filters that turn samples into records or drop them with a reason."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from aimv2_jax.data.dataset_stats import MapCount
from aimv2_jax.data.records import BadRecord, Record, bounded_key
from aimv2_jax.data.transforms import captions
from aimv2_jax.data.transforms.decode import decode_image, image_size
from aimv2_jax.data.transforms.maps import decode_map
from aimv2_jax.prepare.inputs.samples import DroppedSample, MapFile, OutOfRange, Sample

MAX_TEXT_LENGTH = captions.MAX_LETTERS  # Characters of a caption or label.
MAX_CAPTIONS_PER_KIND = 100  # Per record.
_DIGESTS = {32: hashlib.md5, 64: hashlib.sha256}  # Number of hexadecimal digits -> digest.


@dataclasses.dataclass(frozen=True)
class Rules:
    """Requirements of every sample: sides in pixels, `max_aspect` is the longer side over the shorter.

    `captions` maps a kind to a field, or to several fields whose captions are all of that kind; a field may hold a text
    or a list of texts. `labels` maps a name to a field. `keep` maps a field to its accepted values. `verify` is a field
    with a digest of the image's bytes. `decode` requires that all pixels can be decoded. `images` maps the name of a
    second image to a field, and `bits` such a name to the bits, 8 or 16, that its values must have.
    """

    captions: Mapping[str, str | Sequence[str]] = dataclasses.field(default_factory=dict)
    labels: Mapping[str, str] = dataclasses.field(default_factory=dict)
    keep: Mapping[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)
    min_side: int = 32
    max_side: int | None = None
    max_aspect: float = 20.0
    verify: str | None = None
    decode: bool = False
    images: Mapping[str, str] = dataclasses.field(default_factory=dict)
    bits: Mapping[str, int] = dataclasses.field(default_factory=dict)

    @property
    def fields(self) -> tuple[str, ...]:
        """All fields of texts that the rules name."""
        verify = [] if self.verify is None else [self.verify]
        captions = itertools.chain.from_iterable(map(field_list, self.captions.values()))
        return tuple(dict.fromkeys([*captions, *self.labels.values(), *self.keep, *verify]))


def field_list(fields: str | Sequence[str]) -> list[str]:
    """Fields of a caption kind in `Rules.captions`, as a list."""
    return [fields] if isinstance(fields, str) else list(fields)


@dataclasses.dataclass(frozen=True)
class Checked:
    """A record, its image's (width, height), the names of the changes that were made to the sample's texts, and counts.

    `images` has the count of each of its second images.
    """

    record: Record
    size: tuple[int, int]
    changes: tuple[str, ...]
    images: Mapping[str, MapCount] = dataclasses.field(default_factory=dict)


def check(sample: Sample, rules: Rules) -> Checked:
    """Converts a sample to a record; captions stay as they are, because the input pipeline cleans them.

    Raises:
      DroppedSample: if the sample does not pass the rules.
    """
    for field, values in rules.keep.items():
        if text_or_none(sample.fields.get(field)) not in values:
            raise DroppedSample("not_kept")
    if sample.image is None:
        raise DroppedSample(sample.absence)
    if rules.verify is not None:
        _verify(sample.image, sample.fields.get(rules.verify))
    size = _checked_size(sample.image, rules)
    texts, changes = _captions(sample, rules.captions)
    labels, label_changes = _labels(sample, rules.labels)
    if not (texts or labels or rules.images):
        raise DroppedSample("no_label" if rules.labels else "no_caption")
    if rules.decode:
        try:
            decode_image(sample.image)
        except BadRecord as error:
            raise DroppedSample(error.reason) from error
    key = bounded_key(sample.key.encode("utf-8", "backslashreplace").decode())  # File names may be any bytes.
    images, counts = _images(sample, rules, size, key)
    record = Record(key, sample.image, texts, labels, images)
    return Checked(record, size, tuple(dict.fromkeys(changes + label_changes)), counts)


def _images(
    sample: Sample, rules: Rules, size: tuple[int, int], key: str
) -> tuple[dict[str, bytes], dict[str, MapCount]]:
    """The second images of a sample and their counts; each must have one value for every pixel of the image."""
    images, counts = {}, {}
    for name, field in rules.images.items():
        file = sample.maps.get(field, MapFile(None))
        if file.data is None:
            raise DroppedSample(f"{file.absence}:{name}")
        try:
            values = decode_map(file.data)
        except BadRecord as error:
            raise DroppedSample(f"{error.reason}:{name}") from error
        if values.shape[::-1] != size:
            raise DroppedSample(f"other_size:{name}")
        if rules.bits.get(name, 8 * values.itemsize) != 8 * values.itemsize:
            raise DroppedSample(f"other_bits:{name}")
        images[name], counts[name] = file.data, MapCount.of(values, key)
    return images, counts


def _verify(image: bytes, digest: Any) -> None:
    expected = (text_or_none(digest) or "").strip().lower()
    if len(expected) not in _DIGESTS:
        raise DroppedSample("checksum_missing")
    if _DIGESTS[len(expected)](image).hexdigest() != expected:
        raise DroppedSample("checksum_mismatch")


def _checked_size(image: bytes, rules: Rules) -> tuple[int, int]:
    try:
        size = image_size(image)
    except BadRecord as error:
        raise DroppedSample(error.reason) from error
    if min(size) < rules.min_side:
        raise DroppedSample("too_small")
    if rules.max_side is not None and max(size) > rules.max_side:
        raise DroppedSample("too_large")
    if max(size) > rules.max_aspect * min(size):
        raise DroppedSample("too_elongated")
    return size


def _captions(
    sample: Sample, fields: Mapping[str, str | Sequence[str]]
) -> tuple[dict[str, str | list[str]], list[str]]:
    texts_by_kind: dict[str, str | list[str]] = {}
    changes: list[str] = []
    for kind, names in fields.items():
        values = [value for name in field_list(names) for value in _values(sample.fields.get(name))]
        if len(values) > MAX_CAPTIONS_PER_KIND:
            changes.append("captions_left_out")
        texts = list(_usable(values[:MAX_CAPTIONS_PER_KIND], changes))
        if texts:
            texts_by_kind[kind] = texts[0] if len(texts) == 1 else texts
    if fields and not texts_by_kind:
        raise DroppedSample("caption_not_text" if "caption_not_text" in changes else "no_caption")
    return texts_by_kind, changes


def _values(field: Any) -> Sequence[Any]:
    return field if isinstance(field, (list, tuple)) else [field]


def _usable(values: Sequence[Any], changes: list[str]) -> Iterator[str]:
    """Yields the usable captions among `values`; appends to `changes` what was cut or left out."""
    for value in values:
        try:
            text = to_text(value)
        except ValueError:
            changes.append("caption_not_text")
            continue
        if text is None:
            continue
        cut = text[:MAX_TEXT_LENGTH]
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
        value = sample.fields.get(field)
        if isinstance(value, OutOfRange):
            raise DroppedSample(f"label_out_of_range:{name}")
        try:
            text = to_text(value)
        except ValueError:
            changes.append("label_not_text")
            continue
        if text:
            labels[name] = text[:MAX_TEXT_LENGTH]
            if labels[name] != text:
                changes.append("label_cut")
    return labels, changes


def to_text(value: Any) -> str | None:
    """Converts a field's value to text, None for a missing value; raises `ValueError` for anything but UTF-8 text."""
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


def text_or_none(value: Any) -> str | None:
    """As `to_text`, but None for anything but UTF-8 text."""
    try:
        return to_text(value)
    except ValueError:
        return None
