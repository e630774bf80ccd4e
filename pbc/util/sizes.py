"""Sizes of files and of memory in words."""

from __future__ import annotations

import re

_FILE_UNITS = ("bytes", "KB", "MB", "GB")
_MEMORY_UNITS = ("bytes", "KiB", "MiB", "GiB")


def size_text(count: int) -> str:
    """Return the size of a file as people read it: `512 bytes`, `813 KB`, `12.3 MB` (decimal).

    >>> size_text(812_900)
    '813 KB'
    """
    return _text(count, 1000, _FILE_UNITS)


def memory_text(count: int) -> str:
    """Return a size in memory as people read it: `512 KiB`, `12.3 MiB`, `4.0 GiB` (binary).

    >>> memory_text(3 * 2**29)
    '1.5 GiB'
    """
    return _text(count, 1024, _MEMORY_UNITS)


def memory_bytes(text: str) -> int | None:
    """Return the bytes that a text such as `8MiB`, `1.5 GiB` or `300KB` names; None if it is none.

    >>> memory_bytes("1.5MiB")
    1572864
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?) ?([KMG]i?)?B", text)
    if found is None:
        return None
    number, unit = found.groups()
    base = 1024.0 if (unit or "").endswith("i") else 1000.0
    power = " KMG".index((unit or " ")[0])
    return round(float(number) * base**power)


def _text(count: int, base: int, units: tuple[str, ...]) -> str:
    """Write a count in the largest unit that leaves at least one whole of it."""
    size, unit = float(count), 0
    while round(size) >= base and unit + 1 < len(units):
        size, unit = size / base, unit + 1
    return f"{size:.{1 if unit > 1 else 0}f} {units[unit]}"
