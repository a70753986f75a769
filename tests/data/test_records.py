"""Records: exact and checked."""

import dataclasses
import struct
import zlib

import msgpack
import pytest

from aimv2_jax.data.records import BadRecord, Record, decode, encode

RECORD = Record(
    "a/1", b"\xff\xd8 picture", {"alt": "Käse", "synthetic": "a cheese"}, {"label": "cheese", "kind": "photo"}
)


def test_record_when_encoded_and_decoded_then_equal():
    assert decode(encode(RECORD)) == RECORD


def test_record_when_its_dicts_are_in_another_order_then_same_bytes():
    turned = dataclasses.replace(RECORD, captions=dict(reversed(RECORD.captions.items())))
    assert encode(turned) == encode(RECORD)


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


@pytest.mark.parametrize(
    "field",
    [{"captions": {"alt": None}}, {"captions": ["alt"]}, {"captions": {"alt": b"x"}}, {"image": "x"}, {"key": 3}],
)
def test_record_when_another_writer_put_other_types_in_then_corrupt(field):
    payload = msgpack.packb({"key": "a", "image": b"x", "captions": {"alt": "x"}, "labels": {}} | field)
    with pytest.raises(BadRecord, match="corrupt_record"):
        decode(struct.pack("<BI", 1, zlib.crc32(payload)) + payload)
