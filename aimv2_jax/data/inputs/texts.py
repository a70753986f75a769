"""Texts as they were stored: those that are not UTF-8 stay bytes, for whoever cleans them to decide."""

from __future__ import annotations

from typing import Any

from aimv2_jax.untrusted import parse_json_object

ENCODING = {"encoding": "utf-8-sig", "errors": "surrogateescape"}  # With or without a byte order mark.

_MAX_OBJECT_BYTES = 16 << 20  # Objects take twenty times the room of their text.


def stored(text: str) -> str | bytes:
    """`text`, decoded as `ENCODING` says, or its bytes if they are not UTF-8."""
    if text.isascii():
        return text
    try:
        text.encode()
        return text
    except UnicodeEncodeError:
        pass
    try:
        return text.encode(errors="surrogateescape")
    except UnicodeEncodeError:  # JSON can spell halves of letters: "\ud83d".
        return text.encode(errors="surrogatepass")


def readable(name: str | bytes) -> str:
    """`name` as a string that can be printed and stored, without losing what tells it from others."""
    if isinstance(name, str):
        name = stored(name)
    return name if isinstance(name, str) else name.decode(errors="backslashreplace")


def parse_object(data: bytes) -> dict[str, Any] | None:
    """The JSON object in `data` with its texts as `stored`; None if there is none, or it is too large or too deep."""
    if len(data) > _MAX_OBJECT_BYTES:
        return None
    try:
        tree = parse_json_object(
            data.decode(**ENCODING), allow_nan=True
        )  # Python writes NaN for a value that is missing.
    except ValueError:
        return None
    return {readable(key): stored(value) if isinstance(value, str) else value for key, value in tree.items()}
