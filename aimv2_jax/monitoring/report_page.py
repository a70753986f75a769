"""HTML page of a run's report: one self-contained file without scripts."""

from __future__ import annotations

import base64
import html
import io
import string
import struct
from collections.abc import Mapping

from etils import epath
from matplotlib.figure import Figure

from aimv2_jax.storage.files import read_bytes, with_retries

_DOTS_PER_INCH = 160
_MAX_IMAGE_BYTES = 2**23  # The largest figure of eval/ has less than 1 MiB.
_MAX_IMAGE_PIXELS = 25_000_000
_PNG_HEAD = struct.Struct(">8s4x4sII")  # Signature, IHDR, width, height.
_TEMPLATE = string.Template("""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<title>$title</title>
<style>
body { max-width: 980px; margin: 24px auto; padding: 0 24px; color: #222; font: 15px/1.5 system-ui, sans-serif; }
h1, h2 { margin: 28px 0 8px; font-size: 18px; overflow-wrap: anywhere; break-after: avoid; }
h1 { font-size: 26px; }
img { display: block; max-width: 100%; break-inside: avoid; }
pre { font: 13px/1.5 ui-monospace, Menlo, Consolas, monospace; white-space: pre-wrap; overflow-wrap: anywhere; }
</style>
</head>
<body>
<h1>$title</h1>
$body
</body>
</html>
""")


def render_page(
    title: str, sections: Mapping[str, str], figures: Mapping[str, Figure], images: Mapping[str, epath.Path]
) -> str:
    """Renders sections by title, each below its figure if it has one, and PNGs by caption; escapes all text."""
    parts = []
    for name, text in sections.items():
        parts.append(f"<h2>{html.escape(name)}</h2>")
        if name in figures:
            file = io.BytesIO()
            figures[name].savefig(file, format="png", dpi=_DOTS_PER_INCH)
            parts.append(_image_tag(file.getvalue(), name))
        parts.append(f"<pre>{html.escape(text)}</pre>")
    for caption, path in images.items():
        data = _read_png(path)
        parts.append(f"<h2>{html.escape(caption)}</h2>")
        parts.append("<p>The image cannot be read.</p>" if data is None else _image_tag(data, caption))
    return _TEMPLATE.substitute(title=html.escape(title), body="\n".join(parts))


def _image_tag(png: bytes, text: str) -> str:
    return f'<img src="data:image/png;base64,{base64.b64encode(png).decode()}" alt="{html.escape(text)}">'


def _read_png(path: epath.Path) -> bytes | None:
    """The bytes of a PNG of limited size; None if it cannot be read."""
    try:
        if with_retries(path.stat, path).length > _MAX_IMAGE_BYTES:  # `read_bytes` has no limit in a bucket.
            return None
        data = read_bytes(path, _MAX_IMAGE_BYTES)
        signature, chunk, width, height = _PNG_HEAD.unpack_from(data)
    except (OSError, ValueError, struct.error):
        return None
    is_png = signature == b"\x89PNG\r\n\x1a\n" and chunk == b"IHDR"
    return data if is_png and width * height <= _MAX_IMAGE_PIXELS else None
