"""Marks inside an epoch at which a rival is evaluated, outside of its measured time.

A new head on frozen features is nearly trained after one epoch: whole epochs are too coarse a
clock to say when an accuracy was reached.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

FIRST_EPOCH = (0.05, 0.1, 0.25, 0.5, 0.75)
"""Shares of the first epoch's samples; the end of every epoch is evaluated anyway."""


class Marks:
    """The marks of the epoch under way; nothing is due before `begin`.

    found: (seconds since the epoch began, accuracy 0…1) at each mark that was passed.
    """

    def __init__(self) -> None:
        self.found: list[tuple[float, float]] = []
        self._left: list[float] = []
        self._accuracy: Callable[[], float]

    def begin(self, shares: Sequence[float], accuracy: Callable[[], float]) -> None:
        """Expect the shares, ascending, of a new epoch. accuracy: of the rival as it is."""
        self.found, self._left, self._accuracy = [], list(shares), accuracy

    def due(self, share: float) -> bool:
        """Return whether a mark lies at or before this share of the epoch's samples."""
        return bool(self._left) and share >= self._left[0]

    def take(self, share: float, seconds: float) -> None:
        """Evaluate the rival, which has spent `seconds` of this epoch; its clock must stand."""
        self._left = [mark for mark in self._left if mark > share]
        if share < 1:  # at its end the epoch is evaluated anyway
            self.found.append((seconds, self._accuracy()))
