"""Tests of text for figures: line breaks, and escapes for characters that the fonts lack."""

import pytest

from aimv2_jax.plotting import drawable, wrap


@pytest.mark.parametrize(
    ("text", "lines"),
    [
        ("", []),
        ("one two three four five", ["one two", "three four", "five"]),
        ("one two three four five six seven", ["one two", "three four", "five six …"]),
        ("folder/name_of-it", ["folder/", "name_of-it"]),
        ("a" * 25 + " bb", ["a" * 10, "a" * 10, "aaaaa bb"]),
        ("x 日本語日本語日本語日本 end", ["x 日本語日本語日本", "語日本 end"]),
        ("a" * 100, ["a" * 10, "a" * 10, "aaaaaaaa …"]),
    ],
)
def test_wrap_when_lines_hold_ten_letters_then_broken_where_it_reads_best(text, lines):
    assert wrap(text, 10, len, 3) == lines


def test_wrap_when_nothing_fits_then_a_letter_a_line_and_an_end():
    assert wrap("hello there", 0, len, 3) == ["h", "e", "l …"]


def test_drawable_when_no_font_has_a_letter_then_escaped_and_all_else_as_it_is():
    assert drawable("é Ж ע $x^2$\n\tend") == "é Ж ע $x^2$ end"
    assert drawable("a\u200b\x07\ue000") == "a\\u200b\\x07\\ue000"
