"""A database as a notebook shows it: what it holds, and a few of its pictures."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterable, Mapping
from html import escape

SIDE = 96  # pixels
MAX_BYTES = 256 * 2**10  # of a picture that is shown as it is stored
# First bytes of the formats that browsers show, and their media types.
KINDS = ((b"\x89PNG", "png"), (b"\xff\xd8\xff", "jpeg"), (b"GIF8", "gif"), (b"BM", "bmp"))


def database_html(title: str, facts: Mapping[str, object], pictures: Iterable[tuple[str, bytes]]) -> str:
    """A table of facts and a row of pictures; all text is escaped.

    pictures: caption and encoded bytes; those that no browser shows are left out
    """
    rows = "".join(f"<tr><th>{escape(name)}</th><td>{escape(str(value))}</td></tr>" for name, value in facts.items())
    shown = [(caption, uri) for caption, encoded in pictures if (uri := picture_uri(encoded))]
    row = "".join(
        f'<img src="{uri}" alt="{escape(caption)}" title="{escape(caption)}" '
        f'style="max-width:{SIDE}px;max-height:{SIDE}px;margin:2px">'
        for caption, uri in shown
    )
    return f"<div><b>{escape(title)}</b><table>{rows}</table><div>{row}</div></div>"


def picture_uri(encoded: bytes) -> str | None:
    """A data URI of a picture, scaled down where Pillow is installed; None for what cannot be shown."""
    try:
        from PIL import Image
    except ModuleNotFoundError:
        if len(encoded) > MAX_BYTES:
            return None
        kind = next((kind for start, kind in KINDS if encoded.startswith(start)), None)
        kind = "webp" if encoded[:4] == b"RIFF" and encoded[8:12] == b"WEBP" else kind
        return kind and f"data:image/{kind};base64,{base64.b64encode(encoded).decode()}"
    try:
        with Image.open(io.BytesIO(encoded)) as image:
            image.thumbnail((SIDE, SIDE))
            small = io.BytesIO()
            image.convert("RGB").save(small, "PNG")
    except Exception:  # a decoder raises anything
        return None
    return f"data:image/png;base64,{base64.b64encode(small.getvalue()).decode()}"
