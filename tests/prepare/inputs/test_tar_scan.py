"""Scan of the members of intact and damaged tars."""

import io
import tarfile
import time

import pytest

from aimv2_jax.prepare.inputs import tar_scan
from aimv2_jax.prepare.inputs.tar_scan import BLOCK, Gap, Member, scan
from tests.helpers.small_inputs import header_offsets, packed

FILES = {f"{number}.bin": bytes([number + 1]) * (300 + 400 * number) for number in range(6)}


def scanned(data, num_bytes=None):
    """({name: bytes} of the members, the gaps)."""
    items = list(scan(io.BytesIO(data), len(data) if num_bytes is None else num_bytes))
    members = [item for item in items if isinstance(item, Member)]
    return (
        {member.name: data[member.offset : member.offset + member.num_bytes] for member in members},
        [item for item in items if isinstance(item, Gap)],
    )


def without(*names):
    return {name: data for name, data in FILES.items() if name not in names}


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
@pytest.mark.parametrize("name", ["a.jpg", "folder/" + "x" * 90 + ".jpg", "schön-日本.jpg"])
def test_tar_when_sound_then_its_members_whatever_its_format(format, name):
    files = {name: b"picture" * 99, "b.txt": b"", "c.json": bytes(BLOCK)}
    assert scanned(packed(files, format)) == (files, [])


@pytest.mark.parametrize("format", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_name_when_longer_than_a_header_then_whole(format):
    files = {"deep/" * 60 + "a.jpg": b"1", "deep/" * 60 + "b.jpg": b"2"}
    assert scanned(packed(files, format)) == (files, [])


def test_member_when_a_link_or_a_folder_then_left_out():
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for name, kind in (("folder", tarfile.DIRTYPE), ("link", tarfile.SYMTYPE), ("hard", tarfile.LNKTYPE)):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, "x" * 200
            info.size = 700  # Some programs write the size of the link's target.
            tar.addfile(info)
        tar.addfile(tarfile.TarInfo("file"))
    assert scanned(buffer.getvalue()) == ({"file": b""}, [])


def test_tars_when_one_behind_the_other_then_all_members():
    assert scanned(packed({"a": b"1"}) + packed({"b": b"2"})) == ({"a": b"1", "b": b"2"}, [])


@pytest.mark.parametrize("name", FILES)
def test_header_when_damaged_then_only_its_member_is_lost(name):
    data = bytearray(packed(FILES))
    offset = header_offsets(data)[name]
    data[offset + 3] ^= 1
    members, gaps = scanned(bytes(data))
    assert members == without(name)
    assert [gap.name for gap in gaps] == [None]
    following = header_offsets(packed(FILES)) | {"end": len(data)}
    assert gaps[0].num_bytes == min(start for start in following.values() if start > offset) - offset


def test_tar_when_cut_in_a_member_then_the_gap_has_its_name():
    data = packed(FILES)
    offset = header_offsets(data)["5.bin"]
    assert scanned(data[: offset + BLOCK + 100]) == (without("5.bin"), [Gap("5.bin", BLOCK + 100)])


def test_tar_when_cut_in_a_header_then_the_gap_has_no_name():
    data = packed(FILES)
    assert scanned(data[: header_offsets(data)["5.bin"] + 300]) == (without("5.bin"), [Gap(None, 300)])


def test_tar_when_cut_behind_a_member_then_nothing_is_missed():
    data = packed(FILES)
    assert scanned(data[: header_offsets(data)["5.bin"]]) == (without("5.bin"), [])


def test_size_when_beyond_the_end_of_the_file_then_the_members_behind_it_are_found():
    data = bytearray(packed(FILES))
    offset = header_offsets(data)["2.bin"]
    info = tarfile.TarInfo("2.bin")
    info.size = 7 << 30
    data[offset : offset + BLOCK] = info.tobuf(tarfile.USTAR_FORMAT)
    members, gaps = scanned(bytes(data))
    assert members == without("2.bin")
    assert [gap.name for gap in gaps] == ["2.bin"]


def test_bytes_when_missing_inside_a_member_then_the_next_ones_are_found_at_odd_offsets():
    data = packed(FILES)
    at = header_offsets(data)["3.bin"] + BLOCK + 100
    members, gaps = scanned(data[:at] + data[at + 333 :])
    assert members == without("3.bin")
    assert [gap.name for gap in gaps] == ["3.bin"]


def test_bytes_when_missing_behind_a_member_then_it_is_whole_and_nothing_is_passed_over():
    data = packed(FILES)
    at = header_offsets(data)["1.bin"] + BLOCK + len(FILES["1.bin"])
    members, gaps = scanned(data[:at] + data[at + 200 :])
    assert (members, gaps) == (FILES, [])


@pytest.mark.parametrize("junk", [b"junk", b"J" * 5000])
def test_junk_when_behind_the_end_then_a_gap(junk):
    assert scanned(packed(FILES) + junk) == (FILES, [Gap(None, len(junk))])


@pytest.mark.parametrize("num_bytes", [0, 10, BLOCK, 20 * BLOCK])
def test_tar_when_of_nothing_then_nothing(num_bytes):
    assert scanned(bytes(num_bytes)) == ({}, [])


def test_file_when_no_tar_at_all_then_one_gap():
    assert scanned(b"\x01ustar" * 40_000) == ({}, [Gap(None, 240_000)])


def test_file_when_shorter_than_was_said_then_the_scan_ends():
    data = packed(FILES)
    assert scanned(data, num_bytes=len(data) + 5000) == (FILES, [])


def test_headers_when_found_across_the_pieces_of_a_search_then_none_is_missed(monkeypatch):
    monkeypatch.setattr("aimv2_jax.prepare.inputs.tar_scan._MIN_SEARCH_BYTES", 99)
    monkeypatch.setattr("aimv2_jax.prepare.inputs.tar_scan._MAX_SEARCH_BYTES", 600)
    data = bytearray(packed(FILES))
    data[header_offsets(data)["4.bin"]] ^= 1
    assert scanned(bytes(data))[0] == without("4.bin")


@pytest.mark.parametrize("format", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_long_name_when_its_block_is_damaged_then_no_member_of_another_name(format):
    files = {"x" * 150 + ".jpg": b"1", "b.jpg": b"2"}
    data = bytearray(packed(files, format))
    data[0] ^= 1
    members, gaps = scanned(bytes(data))
    assert members.pop("x" * 100, b"1") == b"1"
    assert members == {"b.jpg": b"2"}
    assert gaps


def test_pax_record_when_broken_then_its_member_is_lost():
    files = {"x" * 150 + ".jpg": b"1" * 600, "b.jpg": b"2"}
    data = bytearray(packed(files, tarfile.PAX_FORMAT))
    data[BLOCK : BLOCK + 4] = b"9999"
    assert scanned(bytes(data)) == ({"b.jpg": b"2"}, [Gap(None, 3 * BLOCK + 600)])


def header(name="a", size=0, kind=tarfile.REGTYPE):
    info = tarfile.TarInfo(name)
    info.size, info.type = size, kind
    return info.tobuf(tarfile.USTAR_FORMAT)


def pax(*records):
    """A pax header of KEY=VALUE records."""
    text = b""
    for record in records:
        length = len(record) + 2
        while length != len(record) + 2 + len(str(length)):
            length = len(record) + 2 + len(str(length))
        text += b"%d %s\n" % (length, record)
    return header("pax", len(text), tarfile.XHDTYPE) + text + bytes(-len(text) % BLOCK)


def test_pax_size_counts_where_the_header_has_none():
    """tarfile writes members of 8 GiB and more like this."""
    member, following = b"1" * BLOCK, header("b.jpg", 1) + b"2"
    assert scanned(pax(b"path=long.jpg", b"size=512") + header("a") + member + following) == (
        {"long.jpg": member, "b.jpg": b"2"},
        [],
    )
    for size in (b"-1", b"x", b"", b"9" * 5000):
        members, gaps = scanned(pax(b"size=" + size) + header("a") + following.ljust(2 * BLOCK, b"\0"))
        assert (members, len(gaps)) == ({"b.jpg": b"2"}, 1)


def test_pax_sparse_members_are_left_out():
    data = pax(b"GNU.sparse.major=1", b"GNU.sparse.minor=0") + header("a", 5) + b"12345".ljust(BLOCK, b"\0")
    assert scanned(data) == ({}, [])


def test_pax_record_of_digits_takes_no_time():
    """Python's tarfile before 3.11.10 takes a minute over these (CVE-2024-6232), and hours over ten times as many."""
    start = time.monotonic()
    assert scanned(pax(b"comment=" + b"1" * 100_000) + header("a.jpg")) == ({"a.jpg": b""}, [])
    assert time.monotonic() - start < 10


class Counting(io.BytesIO):
    num_read = 0

    def read(self, size=-1):
        data = super().read(size)
        self.num_read += len(data)
        return data


LONG = header("x", 0, tarfile.GNUTYPE_LONGNAME)
HOSTILE = {
    "the magic again and again": b"ustar" * 60_000,
    "the magic and sums that are wrong": (b"ustar" + b"0007777 ".rjust(27, b"x")) * 10_000,
    "long names of no member": LONG * 600,
    "long names that claim much": header("x", 200_000, tarfile.GNUTYPE_LONGNAME) * 600,
    "long names and a block of junk": (LONG * 7 + b"x" * BLOCK) * 75,
    "members of junk": (header("a", 100) + b"x" * BLOCK) * 300,
    "members that end at junk": b"".join(header("a", (599 - n) * BLOCK) for n in range(600)) + b"junk",
    "members that end at zeros and junk": b"".join(header("a", (299 - n) * BLOCK) for n in range(300))
    + bytes(300 * BLOCK)
    + b"junk",
    "members beyond the end": header("a", 1 << 30) * 600,
}


@pytest.mark.parametrize("name", HOSTILE)
def test_scan_takes_time_in_proportion_to_the_bytes(monkeypatch, name):
    num_parsed = 0
    parse = tar_scan._parse

    def counted(block):
        nonlocal num_parsed
        num_parsed += 1
        return parse(block)

    monkeypatch.setattr(tar_scan, "_parse", counted)
    file = Counting(HOSTILE[name])
    num_bytes = len(file.getvalue())
    for _ in tar_scan.scan(file, num_bytes):
        pass
    assert num_parsed <= 5 * num_bytes / BLOCK
    assert file.num_read <= 50 * num_bytes
