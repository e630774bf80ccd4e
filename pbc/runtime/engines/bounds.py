"""How much memory and work a graph of a bundle may take, whatever engine runs it.

A graph of a few bytes can ask for terabytes, or for a year. Engines foresee what a call takes from
the shapes of its values, before it runs, and refuse more than is granted here. Of a call that only
infers, fewer photos may fit: it is made in parts (`guarded`). A mini-batch that trains cannot be.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from math import prod
from typing import Any

from pbc.errors import PbcError
from pbc.util.memory import available_bytes

SAMPLES = 2
"""Photos that a graph has to take: one would be a size that may stand for a broadcast."""

MOST_BYTES = 512 << 20
"""What the values of a graph that are alive at once may take for SAMPLES photos, frozen tensors
aside.

The attention of ViT-L at 384² takes 170 MB, the maps of VGG-16 at 224² 26 MB, those of
EfficientNet-B7 at 600² 440 MB.
"""

CALL_BYTES = 256 << 20
"""What a call of several photos may take. What a process holds is up to twice as much, where freed
memory is not given back."""

MOST_WORK = 1 << 41
"""Multiply-accumulates for two photos; ViT-H at 518² needs half. A value that is touched counts as
some."""

TOUCH = 16
"""Multiply-accumulates of a product that take as long as to read or write a value."""

_VALUE_BYTES = 4


class TooManyPhotosError(PbcError):
    """A call that would take too much, of which fewer photos may fit."""


@cache
def training_bytes() -> int:
    """Return what a mini-batch that trains may take: three quarters of what is free at first."""
    return max(MOST_BYTES, available_bytes() * 3 // 4)


@dataclass(frozen=True)
class Calls:
    """Calls of so many photos, and what the values of their graph may take.

    refusal: what is raised for more. hint: what its reader may do.
    """

    photos: int
    granted_bytes: int
    refusal: type[PbcError] = PbcError
    hint: str = ""

    @classmethod
    def least(cls) -> Calls:
        """Return the calls that a graph has to be able to make, to be run at all."""
        return cls(SAMPLES, MOST_BYTES)

    @classmethod
    def inferring(cls, photos: int) -> Calls:
        """Return calls that may be made of fewer photos, if they are of more than one."""
        return cls(photos, CALL_BYTES, TooManyPhotosError)

    @classmethod
    def training(cls, photos: int) -> Calls:
        """Return the calls of a mini-batch on this machine, which is one however large."""
        return cls(photos, training_bytes(), hint=": a smaller --batch needs less")

    def check_bytes(self, size_bytes: int, where: str) -> None:
        """Raise the refusal for more than is granted."""
        if size_bytes > self.granted_bytes:
            raise self.refusal(
                f"{where} would take {size_bytes / 2**20:.0f} MiB for {self.photos} photos; "
                f"at most {self.granted_bytes >> 20} MiB are granted{self.hint}"
            )

    def check_work(self, work: int, where: str) -> None:
        """Raise PbcError for more than MOST_WORK, or as much more as there are more photos."""
        granted = MOST_WORK * max(self.photos, SAMPLES) // SAMPLES
        if work > granted:
            raise PbcError(
                f"{where} needs {work / 1e9:.0f} billion operations for {self.photos} photos; "
                f"at most {granted / 1e9:.0f} are granted"
            )


class CheckedCalls:
    """Calls of one graph by how large they are; what is known of some size is not asked again."""

    def __init__(self) -> None:
        self._fitting = 0
        self._too_many: tuple[int, str] | None = None

    def require(self, size: int, check: Callable[[], None]) -> None:
        """Raise what `check` raises where a call of this size would take too much.

        size: anything that grows with the number of photos.
        """
        if size <= self._fitting:
            return
        if self._too_many is not None and size >= self._too_many[0]:
            raise TooManyPhotosError(self._too_many[1])
        try:
            check()
        except TooManyPhotosError as error:
            self._too_many = size, str(error)
            raise
        self._fitting = size


def photos_at_once(manifest: Mapping[str, Any]) -> int:
    """Return of how many photos images and features together take at most CALL_BYTES."""
    return max(1, CALL_BYTES // _photo_bytes(manifest))


def check_mini_batch(manifest: Mapping[str, Any], photos: int) -> None:
    """Raise PbcError where a mini-batch's images and features alone would take too much."""
    size_bytes = photos * _photo_bytes(manifest)
    if size_bytes > training_bytes():
        raise PbcError(
            f"images and features of {photos} photos would take {size_bytes >> 20} MiB; at most "
            f"{training_bytes() >> 20} MiB are granted: a smaller --batch needs less"
        )


def check_table(manifest: Mapping[str, Any], photos: int) -> None:
    """Raise PbcError where the features of so many photos, held together, would take too much."""
    values = sum(map(prod, manifest["features"].values()))
    size_bytes = _VALUE_BYTES * photos * values
    if size_bytes > training_bytes():
        raise PbcError(
            f"the features of {photos} photos would take {size_bytes >> 20} MiB; at most "
            f"{training_bytes() >> 20} MiB are granted: fewer photos need less"
        )


def _photo_bytes(manifest: Mapping[str, Any]) -> int:
    shapes = (manifest["input"]["shape"], *manifest["features"].values())
    return _VALUE_BYTES * sum(map(prod, shapes))
