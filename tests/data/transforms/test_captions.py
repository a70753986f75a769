"""Caption cleaning."""

import ftfy
import pytest
from hypothesis import given
from hypothesis import strategies as st

from aimv2_jax.data.records import BadRecord
from aimv2_jax.data.transforms.captions import MAX_LETTERS, clean


@pytest.mark.parametrize(
    ("text", "cleaned"),
    [
        ("  A  Cat\n\ton a\u00a0Mat ", "a cat on a mat"),
        ("Tom &amp;amp; Jerry &#39;s", "tom & jerry 's"),
        ("sch\u00c3\u00b6n", "schön"),  # UTF-8 read as Latin-1.
        ("&lt;b&gt;Bold&lt;/b&gt;", "<b>bold</b>"),
        ("STRASSE ÄÖ", "strasse äö"),
        ("nul&#0;l", "nul\ufffdl"),
        ("日本の城", "日本の城"),
    ],
)
def test_clean_fixes_unescapes_folds_lowercases(text, cleaned):
    """A cleaned caption has its encoding fixed, HTML unescaped, white space folded and letters in lower case."""
    assert clean(text) == cleaned


@pytest.mark.parametrize("text", ["", "   \n\t", "&nbsp;", "\u200b \u2060", "\x00\x07"])
def test_caption_when_nothing_is_left_then_empty_caption(text):
    with pytest.raises(BadRecord, match="empty_caption"):
        clean(text)


def test_caption_when_a_lone_surrogate_is_in_it_then_still_utf_8():
    assert clean("a \ud800 b &#xD800;").encode()


@given(st.text(st.characters(min_codepoint=32, max_codepoint=126, exclude_characters="&")))
def test_ftfy_leaves_plain_ascii_unchanged(text):
    """A caption of plain ASCII, for which ftfy is skipped, would not have been changed by it."""
    assert ftfy.fix_text(text) == text


@pytest.mark.parametrize("text", ["a \x1b[31mred b", "a &lt; b", "a\rb\x07c", "it\u2019s"])
def test_clean_applies_ftfy_unless_plain_ascii(text):
    """A caption that is not plain ASCII is fixed by ftfy."""
    fixed = ftfy.fix_text(text)
    assert fixed != text and clean(text) == " ".join(fixed.split()).lower()


def test_clean_when_16_million_letters_then_reads_the_first_only():
    """Captions may have any length; a step must not spend 16 s on one."""
    long = "Käse &amp; " * 1_600_000
    assert clean(long) == clean(long[:MAX_LETTERS])
