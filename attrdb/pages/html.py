"""Pictures inside the text of a page, so that the page is one file."""

from __future__ import annotations

import base64
import io

from PIL import Image


def data_uri(encoded: bytes, side: int) -> tuple[str, tuple[int, int]]:
    """An encoded picture as a data URI, and its size as stored; one that is larger than `side` pixels is scaled down."""
    with Image.open(io.BytesIO(encoded)) as image:
        size, mime = image.size, image.get_format_mimetype()
        if max(size) > side:
            image.thumbnail((side, side))
            small = io.BytesIO()
            image.convert("RGB").save(small, "WEBP", quality=85)
            encoded, mime = small.getvalue(), "image/webp"
    return f"data:{mime};base64,{base64.b64encode(encoded).decode()}", size
