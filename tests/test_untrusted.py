"""Tests of reading untrusted input: files, JSON, numbers and text for a terminal."""

import os

import pytest

from aimv2_jax.untrusted import (
    OutsideFolder,
    TooLarge,
    as_int,
    is_inside,
    parse_json,
    parse_json_object,
    printable,
    read_file,
    read_json_object,
    shorten,
)


def test_read_file_returns_a_regular_files_bytes(tmp_path):
    """Files above the limit, missing files and names with a zero byte raise errors of their own."""
    (tmp_path / "a").write_bytes(b"abc")
    assert read_file(tmp_path / "a", 3) == b"abc"
    with pytest.raises(TooLarge, match="3 bytes, the limit is 2"):
        read_file(tmp_path / "a", 2)
    with pytest.raises(FileNotFoundError):
        read_file(tmp_path / "b", 2)
    with pytest.raises(ValueError):
        read_file(f"{tmp_path}/a\0b", 2)


def test_read_file_refuses_pipes_devices_and_folders(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", "/dev/zero", tmp_path):
        with pytest.raises((ValueError, IsADirectoryError)):
            read_file(path, 1 << 20)


def test_read_file_is_bounded_by_the_reported_size():
    """Files of /proc report 0 bytes, and some never end: a file with more bytes than reported is refused."""
    with pytest.raises(ValueError, match="grows"):
        read_file("/proc/self/status", 1 << 20)


def test_read_file_does_not_follow_links_outside(tmp_path):
    """With `inside`, links may lead to files of that folder only; without it, anywhere."""
    inner = tmp_path / "inner"
    (inner / "sub").mkdir(parents=True)
    (tmp_path / "secret").write_bytes(b"s")
    (inner / "sub" / "own").write_bytes(b"o")
    (inner / "link").symlink_to("../secret")
    (inner / "dir").symlink_to("..")
    (inner / "good").symlink_to("sub/own")
    for name in ("link", "dir/secret", "../secret"):
        with pytest.raises(OutsideFolder, match="outside"):
            read_file(inner / name, 10, inside=inner)
    assert read_file(inner / "good", 10, inside=inner) == b"o"
    assert read_file(inner / "link", 10) == b"s"
    assert not is_inside(tmp_path / "inner2", inner)


def test_parse_json_refuses_depth_and_constants():
    """Nesting above 64 levels, NaN, Infinity, and text that is not JSON in UTF-8 raise ValueError."""
    assert parse_json("[" * 64 + "]" * 64)
    for text in ("[" * 65 + "]" * 65, "[" * 200_000, '{"a":' * 200_000, "NaN", "[-Infinity]", b"\xff", "1" * 5000, ""):
        with pytest.raises(ValueError):
            parse_json(text)
    with pytest.raises(ValueError, match="not an object"):
        parse_json_object("[1]")
    assert str(parse_json_object('{"a": NaN, "b": -Infinity}', allow_nan=True)) == "{'a': nan, 'b': -inf}"


def test_read_json_object(tmp_path):
    (tmp_path / "a.json").write_text('{"a": 1}')
    assert read_json_object(tmp_path / "a.json") == {"a": 1}


def test_as_int_takes_ints_in_range_only():
    assert as_int(3, 0, 3) == 3
    for value in (4, -1, True, 1.0, "1", None, 10**400):
        with pytest.raises(ValueError):
            as_int(value, 0, 3)


def test_printable_escapes_control_characters():
    assert printable("a\x1b]0;X\x07\r\n\u202eb") == r"a\x1b]0;X\x07\r\n\u202eb"
    assert printable("ünï 图") == "ünï 图"
    assert len(printable("x" * 1000)) <= 200
    assert shorten("abcdefghij" * 3, 15) == "abcde ... fghij"
