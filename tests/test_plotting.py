"""Tests of text for figures: line breaks, and escapes for characters that the fonts lack."""

import pytest

from aimv2_jax import plotting
from aimv2_jax.plotting import drawable, wrap


@pytest.mark.parametrize(
    ("text", "lines"),
    [
        ("", []),
        ("one two three four five", ["one two", "three four", "five"]),
        ("one two three four five six seven", ["one two", "three four", "five six …"]),
        ("a" * 25 + " bb", ["a" * 10, "a" * 10, "aaaaa bb"]),
        ("x 日本語日本語日本語日本 end", ["x 日本語日", "本語日本語", "日本 end"]),
        ("a" * 10_000, ["a" * 10, "a" * 10, "aaaaaaaa …"]),
    ],
)
def test_wrap_to_ten_characters(text, lines, monkeypatch):
    """Lines hold ten characters, or five East Asian ones, and the last of three ends in … if text was cut off."""
    monkeypatch.setattr(plotting, "drawable", lambda text: text)  # As if a font had all characters.
    assert wrap(text, 10, 3) == lines


def test_drawable_when_no_font_has_a_letter_then_escaped_and_all_else_as_it_is():
    assert drawable("é Ж ע $x^2$\n\tend") == "é Ж ע $x^2$ end"
    assert drawable("a\u200b\x07\ue000") == "a\\u200b\\x07\\ue000"
