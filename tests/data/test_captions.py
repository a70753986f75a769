"""Cleaning of captions."""

import pytest

from aimv2_jax.data.captions import clean
from aimv2_jax.data.records import BadRecord


@pytest.mark.parametrize(
    ("text", "cleaned"),
    [
        ("  A  Cat\n\ton a\u00a0Mat ", "a cat on a mat"),
        ("Tom &amp;amp; Jerry &#39;s", "tom & jerry 's"),
        ("sch\u00c3\u00b6n", "schön"),  # UTF-8 read as Latin-1
        ("&lt;b&gt;Bold&lt;/b&gt;", "<b>bold</b>"),
        ("STRASSE ÄÖ", "strasse äö"),
        ("nul&#0;l", "nul\ufffdl"),
        ("日本の城", "日本の城"),
    ],
)
def test_caption_when_cleaned_then_mended_unescaped_folded_lowered(text, cleaned):
    assert clean(text) == cleaned


@pytest.mark.parametrize("text", ["", "   \n\t", "&nbsp;", "\u200b \u2060", "\x00\x07"])
def test_caption_when_nothing_is_left_then_empty_caption(text):
    with pytest.raises(BadRecord, match="empty_caption"):
        clean(text)


def test_caption_when_a_lone_surrogate_is_in_it_then_still_utf_8():
    assert clean("a \ud800 b &#xD800;").encode()
