"""Caption cleaning (RECIPE.md, section 7)."""

from __future__ import annotations

import html

import ftfy

from aimv2_jax.data.records import BadRecord

MAX_LETTERS = 4096  # Letters of a caption that are cleaned: many times the 77 pieces that a model reads.


def clean(text: str) -> str:
    """`text` with broken encoding fixed, HTML entities resolved, white space folded, in lower case.

    Only the first `MAX_LETTERS` letters are kept: captions may have any length, and cleaning takes time.

    Raises:
      BadRecord: `empty_caption`, if nothing is left.
    """
    text = text[:MAX_LETTERS]
    if not (text.isascii() and text.isprintable() and "&" not in text):  # Plain text needs no fixing.
        # Unescaped twice, as CLIP does: web pages contain "&amp;amp;".
        text = html.unescape(html.unescape(ftfy.fix_text(text)))
    text = " ".join(text.split()).lower()
    # A zero-width space alone also counts as empty: it gives no piece.
    if not any(letter.isprintable() and letter != " " for letter in text):
        raise BadRecord("empty_caption")
    return text
