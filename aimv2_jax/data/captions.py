"""Captions: the recipe's cleaning (RECIPE.md, section 7)."""

from __future__ import annotations

import html

import ftfy

from aimv2_jax.data.records import BadRecord

MAX_LETTERS = 4096  # Of a caption before it is cleaned: many times the 77 pieces that a model reads.


def clean(text: str) -> str:
    """`text` with broken encoding mended, HTML entities resolved, white space folded, in lower case.

    Only its first `MAX_LETTERS` letters are read: what others wrote may be of any length, and cleaning takes time.

    Raises:
      BadRecord: `empty_caption`, if nothing is left.
    """
    text = text[:MAX_LETTERS]
    if not (text.isascii() and text.isprintable() and "&" not in text):  # Else there is nothing to mend.
        # Twice, as CLIP does: web pages hold "&amp;amp;".
        text = html.unescape(html.unescape(ftfy.fix_text(text)))
    text = " ".join(text.split()).lower()
    # Not a zero-width space alone, either: no piece would come of it.
    if not any(letter.isprintable() and letter != " " for letter in text):
        raise BadRecord("empty_caption")
    return text
