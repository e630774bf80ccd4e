"""Small pictures of photos, in the page itself: it can be moved and mailed."""

from __future__ import annotations

import base64
import io
import zipfile
from pathlib import Path

from PIL import Image, ImageOps

from pbc.data.listing import FILES

_SIDE = 160
_QUALITY = 70


def thumbnail(photo: str) -> str | None:
    """Return a data: URL of a JPEG of at most 160 pixels; None where the photo cannot be read.

    photo: its file, or its place in a zip, as Samples.path says it.
    """
    try:
        data = _bytes(Path(photo))
        if data is None:
            return None
        with Image.open(io.BytesIO(data)) as image:
            image.draft("RGB", (2 * _SIDE, 2 * _SIDE))
            image.thumbnail((_SIDE, _SIDE))
            upright = ImageOps.exif_transpose(image).convert("RGB")
    except Exception:  # Pillow and zipfile raise nearly anything for a damaged file
        return None
    small = io.BytesIO()
    upright.save(small, "JPEG", quality=_QUALITY)
    return f"data:image/jpeg;base64,{base64.b64encode(small.getvalue()).decode()}"


def _bytes(path: Path) -> bytes | None:
    if path.is_file():
        return path.read_bytes() if path.stat().st_size <= FILES.most_bytes else None
    archive = next((parent for parent in path.parents if parent.is_file()), None)
    if archive is None:
        return None
    with zipfile.ZipFile(archive) as opened:
        entry = opened.getinfo(path.relative_to(archive).as_posix())
        return opened.read(entry) if entry.file_size <= FILES.most_bytes else None
