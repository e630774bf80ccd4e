"""How much memory and work a graph of a bundle may take, whatever engine runs it.

A graph of a few bytes can ask for terabytes, or for a year. Engines foresee what a graph takes
from the shapes of its values, before it first runs, and refuse more than is granted here.
"""

from __future__ import annotations

from pbc.errors import PbcError

SAMPLES = 2
"""Photos that the bounds are for: one would be a size that may stand for a broadcast."""

MOST_BYTES = 512 << 20
"""What the values of a graph that are alive at once may take, frozen tensors aside.

The attention of ViT-L at 384² takes 170 MB, the maps of VGG-16 at 224² 26 MB.
"""

MOST_WORK = 1 << 41
"""Multiply-accumulates; ViT-H at 518² needs half. A value that is touched counts as some."""

TOUCH = 16
"""Multiply-accumulates of a product that take as long as to read or write a value."""


def check_bytes(size_bytes: int, where: str, samples: int = SAMPLES) -> None:
    """Raise PbcError for more than MOST_BYTES, or as much more as there are more photos."""
    granted = MOST_BYTES * samples // SAMPLES
    if size_bytes > granted:
        raise PbcError(
            f"{where} would take {size_bytes / 2**20:.0f} MiB for {samples} photos; "
            f"at most {granted >> 20} MiB are granted"
        )


def check_work(work: int, where: str, samples: int = SAMPLES) -> None:
    """Raise PbcError for more than MOST_WORK, or as much more as there are more photos."""
    granted = MOST_WORK * samples // SAMPLES
    if work > granted:
        raise PbcError(
            f"{where} needs {work / 1e9:.0f} billion operations for {samples} photos; "
            f"at most {granted / 1e9:.0f} are granted"
        )
