"""Texts that users give, as models read them."""

from __future__ import annotations

from aimv2_jax.data.records import BadRecord
from aimv2_jax.data.transforms.captions import clean
from aimv2_jax.errors import UserError


def clean_text(text: str) -> str:
    """`text` cleaned as captions are in training.

    Raises:
      UserError: for a text without a letter.
    """
    try:
        return clean(text)
    except BadRecord as error:
        raise UserError("a caption has no letter", text, "Leave it out") from error
