"""Sizes of files in words."""

from __future__ import annotations

_UNITS = ("bytes", "KB", "MB", "GB")


def size_text(count: int) -> str:
    """Return a number of bytes as people read it: `512 bytes`, `813 KB`, `12.3 MB` (decimal units).

    >>> size_text(812_900)
    '813 KB'
    """
    size, unit = float(count), 0
    while round(size) >= 1000 and unit + 1 < len(_UNITS):
        size, unit = size / 1000, unit + 1
    return f"{size:.{1 if unit > 1 else 0}f} {_UNITS[unit]}"
