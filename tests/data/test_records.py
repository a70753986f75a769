"""Record format: exact round trips and corruption checks."""

import dataclasses
import struct
import zlib

import msgpack
import pytest

from aimv2_jax.data.records import MAX_KEY_LETTERS, BadRecord, Record, decode, encode

RECORD = Record(
    "a/1", b"\xff\xd8 picture", {"alt": "Käse", "synthetic": "a cheese"}, {"label": "cheese", "kind": "photo"}
)


def test_record_when_encoded_and_decoded_then_equal():
    assert decode(encode(RECORD)) == RECORD


def test_record_when_its_dicts_are_in_another_order_then_same_bytes():
    reordered = dataclasses.replace(RECORD, captions=dict(reversed(RECORD.captions.items())))
    assert encode(reordered) == encode(RECORD)


def test_record_when_any_bit_is_flipped_then_corrupt_or_in_its_first_byte_of_another_version():
    data = encode(RECORD)
    for bit in range(8 * len(data)):
        flipped = bytearray(data)
        flipped[bit // 8] ^= 1 << bit % 8
        with pytest.raises(BadRecord, match="other_version" if bit < 8 else "corrupt_record"):
            decode(bytes(flipped))


def test_record_when_cut_anywhere_then_corrupt():
    data = encode(RECORD)
    for length in range(len(data)):
        with pytest.raises(BadRecord, match="corrupt_record"):
            decode(data[:length])


def packed(version=1, **fields):
    payload = msgpack.packb({"key": "a", "image": b"x", "captions": {"alt": "x"}, "labels": {}} | fields)
    return struct.pack("<BI", version, zlib.crc32(payload)) + payload


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize(
    "field",
    [
        *({"captions": {"alt": None}}, {"captions": ["alt"]}, {"captions": {"alt": b"x"}}, {"image": "x"}, {"key": 3}),
        *({"captions": {"alt": ["a", b"x"]}}, {"captions": {"alt": ["a", ["b"]]}}, {"captions": {"alt": {"a": "b"}}}),
        *({"labels": {"l": b"x"}}, {"labels": {"l": {"a": "b"}}}, {"labels": {"l": 3}}, {"labels": ["l"]}),
    ],
)
def test_record_when_another_writer_put_other_types_in_then_corrupt(version, field):
    with pytest.raises(BadRecord, match="corrupt_record"):
        decode(packed(version, **field))


def test_record_with_several_captions_of_a_kind_is_version_2():
    record = dataclasses.replace(RECORD, captions={"alt": "Käse", "synthetic": ["a cheese", "cheese on a plate"]})
    data = encode(record)
    assert data[0] == 2 and decode(data) == record
    assert record.texts("synthetic") == ["a cheese", "cheese on a plate"]
    assert record.texts("alt") == ["Käse"] and record.texts("none") == []


def test_record_without_lists_is_version_1_as_ever():
    """A record without lists has the bytes of version 1, which older programs read."""
    assert encode(RECORD)[0] == 1 and decode(packed()) == Record("a", b"x", {"alt": "x"})
    lists = dataclasses.replace(RECORD, captions={kind: [text] for kind, text in RECORD.captions.items()})
    assert encode(dataclasses.replace(lists, captions=lists.captions | {"none": []})) == encode(RECORD)


def test_record_of_version_1_with_a_list_is_corrupt():
    with pytest.raises(BadRecord, match="corrupt_record"):
        decode(packed(1, captions={"alt": ["a", "b"]}))
    assert decode(packed(2, captions={"alt": ["a", "b"]})).texts("alt") == ["a", "b"]


def test_key_of_a_foreign_record_is_bounded():
    keys = [decode(packed(key="k" * 20_000_000 + end)).key for end in "ab"]
    assert keys[0] != keys[1] and {len(key) for key in keys} == {MAX_KEY_LETTERS}


MASKED = dataclasses.replace(RECORD, images={"mask": b"\x89PNG mask", "depth": b"\x89PNG depth"})


def test_record_with_second_images_is_version_3():
    """Second images come back by name; their order does not change the bytes."""
    data = encode(MASKED)
    assert data[0] == 3 and decode(data) == MASKED
    assert encode(dataclasses.replace(MASKED, images=dict(reversed(MASKED.images.items())))) == data


@pytest.mark.parametrize(
    ("version", "fields"), [(1, {"images": {"mask": b"x"}}), (2, {"images": {"m": b"x"}}), (3, {})]
)
def test_record_whose_version_denies_its_images(version, fields):
    """A version that does not fit the second images is refused, so that none is silently left out."""
    with pytest.raises(BadRecord, match="other_version"):
        decode(packed(version, **fields))


@pytest.mark.parametrize("images", [{"mask": "x"}, {3: b"x"}, {"mask": {"a": b"x"}}, ["mask"], [b"x"], b"x"])
def test_record_with_second_images_of_other_types(images):
    """Second images of another writer that are no bytes by name are corrupt."""
    with pytest.raises(BadRecord, match="corrupt_record"):
        decode(packed(3, images=images))
