"""A model that grows while photos come: which of its heads is worth leaving in the folder."""

from __future__ import annotations

from pbc.data import Samples
from pbc.runtime.closed_form import Head
from pbc.runtime.engines import Executable
from pbc.runtime.evaluation import KeptFeatures


class GrowingModel:
    """The heads for the time being of one run, the best of them by held-out photos if any."""

    def __init__(self, held_out: Samples | None, level: int) -> None:
        self._held_out = KeptFeatures(held_out, level) if held_out is not None else None
        self._shown: Head | None = None
        self._best = -1.0

    def is_new(self, head: Head) -> bool:
        """Return whether this head was not judged yet."""
        return head is not self._shown

    def judged(self, head: Head, executable: Executable, batch: int) -> str | None:
        """Return what the user should know of a new head; None where an earlier one is better.

        executable: started with the head.
        """
        self._shown = head
        if self._held_out is None:
            return f"{head.accuracy:.1%} by leave-one-out"
        accuracy = self._held_out.accuracy(executable, batch)
        if accuracy < self._best:
            return None
        self._best = accuracy
        return f"{accuracy:.1%} on the held-out photos"
