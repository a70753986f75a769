"""Decoding of stored texts; texts that are not UTF-8 stay bytes for the filters to handle."""

from __future__ import annotations

from typing import Any

from aimv2_jax.untrusted import parse_json_object

ENCODING = {"encoding": "utf-8-sig", "errors": "surrogateescape"}  # Accepts texts with or without a byte order mark.

_MAX_OBJECT_BYTES = 16 << 20  # Parsed objects take twenty times the memory of their text.


def text_or_bytes(text: str) -> str | bytes:
    """Returns a `text` that was decoded with `ENCODING`, or its original bytes if they are not UTF-8."""
    if text.isascii():
        return text
    try:
        text.encode()
        return text
    except UnicodeEncodeError:
        pass
    try:
        return text.encode(errors="surrogateescape")
    except UnicodeEncodeError:  # JSON can contain half a surrogate pair: "\ud83d".
        return text.encode(errors="surrogatepass")


def escape_name(name: str | bytes) -> str:
    """Returns `name` as a valid UTF-8 string, with other bytes as escapes so that names stay distinct."""
    if isinstance(name, str):
        name = text_or_bytes(name)
    return name if isinstance(name, str) else name.decode(errors="backslashreplace")


def parse_object(data: bytes) -> dict[str, Any] | None:
    """Parses a JSON object with its texts as `text_or_bytes`; None if `data` is not one, too large or too deep."""
    if len(data) > _MAX_OBJECT_BYTES:
        return None
    try:
        # Python writes NaN for a missing value.
        tree = parse_json_object(data.decode(**ENCODING), allow_nan=True)
    except ValueError:
        return None
    return {escape_name(key): text_or_bytes(value) if isinstance(value, str) else value for key, value in tree.items()}
