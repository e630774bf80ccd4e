"""Pictures of more than 8 bits per sample, mapped to 8 by a stated rule."""

from __future__ import annotations

import numpy as np
from PIL import Image

MODES = ("I;16", "I;16L", "I;16B", "I;16N", "I", "F")
"""Pillow's modes of one channel that its own conversion would clip at 255."""

# Values per block: temporary arrays stay small beside the picture.
_BLOCK = 1 << 20


def eight_bits(
    image: Image.Image, bits: int | None, *, inverted: bool = False, clear: int | None = None
) -> Image.Image:
    """Map a picture of 16 or 32 bits per sample to mode L.

    bits: the depth the file declares, up to 16: 0 becomes 0 and 2^bits - 1 becomes 255.
    Where it is None (32-bit integers and floats declare no range in use), the range is the
    smallest of 0…1 (floats), 0…255 and 0…65535 that holds all values, and else the lowest to the
    highest value of the picture. Values that are no numbers become the lowest.
    inverted: the file's zero is white. clear: the value that is transparent, which becomes white.
    """
    values = np.asarray(image)
    low, high = (0.0, 2.0**bits - 1) if bits is not None else _range(values)
    scale = 255 / (high - low) if high > low else 0.0
    mapped = np.empty(values.shape, np.uint8)
    rows = max(1, _BLOCK // max(1, values.shape[1]))
    for start in range(0, len(values), rows):
        raw = values[start : start + rows]
        block = np.nan_to_num(raw.astype(np.float64), nan=low, posinf=high, neginf=low)
        block = np.clip((block - low) * scale, 0, 255)
        if inverted:
            block = 255 - block
        if clear is not None:
            block[raw == clear] = 255
        mapped[start : start + rows] = np.rint(block)
    return Image.fromarray(mapped)


def _range(values: np.ndarray) -> tuple[float, float]:
    floats = values.dtype.kind == "f"
    finite = values[np.isfinite(values)] if floats else values
    if finite.size == 0:
        return 0.0, 1.0
    low, high = float(finite.min()), float(finite.max())
    if low >= 0:
        for top in (1.0, 255.0, 65535.0) if floats else (255.0, 65535.0):
            if high <= top:
                return 0.0, top
    return low, high
