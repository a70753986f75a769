"""Tests of parsed and checked flags."""

from pathlib import Path

import pytest

from aimv2_jax.cli import Parser, check_output, make_output_folder, size
from aimv2_jax.errors import UserError


@pytest.mark.parametrize(
    ("file", "message"),
    [
        ("a.jpg", "does not end in .png"),
        ("there.png", "--output is a folder"),
        ("none/a.png", "no such folder"),
        ("file/a.png", "no such folder"),
    ],
)
def test_output_when_it_cannot_be_that_file_then_refused(tmp_path, file, message):
    (tmp_path / "there.png").mkdir()
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=message):
        check_output(tmp_path / file, suffix=".png")
    check_output(tmp_path / "a.PNG", suffix=".png")


def test_output_when_without_a_name_then_refused():
    for file in (Path("/"), Path(".")):
        with pytest.raises(UserError, match="--output is a folder"):
            check_output(file)


def test_output_folder_when_new_then_made_and_when_a_file_is_in_its_place_then_refused(tmp_path):
    for _ in range(2):
        make_output_folder(tmp_path / "new/one")
    assert (tmp_path / "new/one").is_dir()
    (tmp_path / "new/file").touch()
    for folder in ("new/file", "new/file/in/it"):
        with pytest.raises(UserError, match="--output is a file"):
            make_output_folder(tmp_path / folder)


def test_size_when_in_any_unit_then_bytes():
    """Decimal and binary units in any case, with or without a space; a bare number counts bytes."""
    texts = {"1GB": 10**9, "1.5 MB": 1_500_000, "64KiB": 65_536, "2gib": 2 << 30, "4000": 4000}
    assert {text: size(text) for text in texts} == texts


@pytest.mark.parametrize("words", [["--picture", "a.png"], ["--picture=a.png"]])
def test_flag_renamed_then_new_name(words, capsys):
    """A flag of an older version gets one line with its new name, and exit code 2."""
    parser = Parser()
    parser.add_argument("--image")
    with pytest.raises(SystemExit, match="2"):
        parser.parse_args(words)
    assert capsys.readouterr().err.endswith("It is called --image now.\n")


def test_flag_renamed_elsewhere_then_help(capsys):
    """A command without the new flag does not name it for the old one."""
    parser = Parser()
    parser.add_argument("--image-size")
    with pytest.raises(SystemExit, match="2"):
        parser.parse_args(["--picture", "a.png"])
    assert capsys.readouterr().err.endswith("unrecognized arguments: --picture a.png. See --help.\n")
