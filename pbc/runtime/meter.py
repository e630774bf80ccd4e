"""Seconds by stage of a run, and the memory that the process has needed."""

from __future__ import annotations

import resource
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from time import perf_counter

STAGES = (
    "measure",
    "decode",
    "policy",
    "audit",
    "prefix",
    "cache",
    "forward",
    "backward",
    "bookkeeping",
)
"""Stages that a run's time is charged to.

measure: timing levels before the first epoch. decode: from files, or from a stream and whatever it
waits for, to pixels. policy: predicting fidelities. audit: comparing levels with level 0 on the
user's photos. prefix: features. cache: filling it and gathering from it. forward: of the body,
or a closed form's sums. backward: of the body, with the optimizer's update, or a closed form's
solution. bookkeeping: all else that the run does, such as
planning, reporting and checkpoints.
"""


class Meter:
    """Seconds per stage, by laps: each lap charges the time since the previous one.

    Between a restart and a lap every second belongs to exactly one stage.
    """

    def __init__(self) -> None:
        self.seconds: dict[str, float] = dict.fromkeys(STAGES, 0.0)
        self._last = perf_counter()

    def restart(self) -> None:
        """Begin to count now: the time since the last lap belongs to no stage."""
        self._last = perf_counter()

    def reset(self) -> None:
        """Set every stage to zero; the time since the last lap is still to be charged."""
        self.seconds = dict.fromkeys(self.seconds, 0.0)

    def lap(self, stage: str) -> None:
        """Charge the time since the last lap to `stage`."""
        now = perf_counter()
        self.seconds[stage] += now - self._last
        self._last = now

    @contextmanager
    def only(self, stage: str) -> Iterator[None]:
        """Charge everything inside the block to one stage, whatever laps are taken there."""
        self.lap("bookkeeping")
        before = dict(self.seconds)
        try:
            yield
        finally:
            self.lap(stage)
            spent = self.total_seconds() - sum(before.values())
            self.seconds = {**before, stage: before[stage] + spent}

    def total_seconds(self) -> float:
        """Return the sum over the stages."""
        return sum(self.seconds.values())


def peak_memory_bytes() -> int:
    """Return the largest resident size that this process has had."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
