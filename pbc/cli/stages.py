"""Lines about the stages of long work: how long each took and, in a pipe, how far it is."""

from __future__ import annotations

from collections.abc import Callable
from time import monotonic

_LONG_SECONDS = 5.0


class StageLines:
    """A receiver of pbc.util.progress: a line for each stage that is over.

    tenths: a line for each tenth of a stage that takes long, too, where there is no bar.
    """

    def __init__(self, line: Callable[[str], None], *, tenths: bool) -> None:
        self._line = line
        self._tenths = tenths
        self._begun: dict[str, float] = {}
        self._told: dict[str, int] = {}

    def __call__(self, stage: str, fraction: float, text: str) -> None:
        """Take what a stage reports; one at its end without a text is over."""
        now = monotonic()
        seconds = now - self._begun.setdefault(stage, now)
        if fraction >= 1 and not text:
            self._line(f"  {stage:<20} {seconds:7.1f} s")
            del self._begun[stage]
            self._told.pop(stage, None)
            return
        tenth = int(10 * fraction)
        if self._tenths and tenth > self._told.get(stage, 0) and seconds >= _LONG_SECONDS:
            self._told[stage] = tenth
            self._line(f"  {stage:<20} {10 * tenth:3} %  {text}")
