"""When a run has learnt enough: by its time, by its accuracy, or by how that still grows."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np

from pbc.errors import UsageError

AUTO = "auto"
_SECONDS = {"s": 1.0, "m": 60.0, "h": 3600.0}
# A curve of fewer points says nothing of how it goes on; of more, the later half says how.
_LEAST_POINTS = 4
_LEAST_FITTED = 3
# Neighbours on a curve are mostly right and wrong on the same photos: of the variance that as many
# other photos would have, so much is between them.
_BETWEEN_NEIGHBOURS = 0.25

Curve: TypeAlias = Sequence[tuple[int, float]]
"""(samples visited, accuracy in 0…1), ascending."""


@dataclass(frozen=True)
class Stop:
    """A wish to stop early: after seconds, from an accuracy in 0…1 on; else by the curve."""

    seconds: float | None = None
    accuracy: float | None = None

    @classmethod
    def parse(cls, text: str) -> Stop:
        """Read `auto`, a time such as 90s, 5m or 1h, or an accuracy such as 95%."""
        unit, value = text[-1:], _number(text[:-1])
        if text == AUTO:
            return cls()
        if unit in _SECONDS and value > 0:
            return cls(seconds=value * _SECONDS[unit])
        if unit == "%" and 0 < value <= 100:
            return cls(accuracy=value / 100)
        raise UsageError(
            f"cannot stop at {text!r}: expected {AUTO}, a time such as 90s, 5m or 1h, "
            "or an accuracy such as 95%"
        )

    def late(self, seconds: float) -> str | None:
        """Return the line that says why, where the time is over."""
        if self.seconds is None or seconds < self.seconds:
            return None
        return f"stopping: {seconds:.1f} s are spent of {self.seconds:g}"

    def enough(self, curve: Curve, total: int, least_points: float, photos: int) -> str | None:
        """Return the line that says why, where the curve's last point is good enough.

        total: samples that a whole run visits. least_points: what is left has to bring, in points
        of accuracy, to be worth it. photos: how many the accuracies are of.
        """
        if not curve:
            return None
        visited, accuracy = curve[-1]
        if self.accuracy is not None and accuracy >= self.accuracy:
            return f"stopping: {accuracy:.1%} is reached, at least {self.accuracy:.1%} were wanted"
        if self.seconds is not None or self.accuracy is not None or visited >= total:
            return None
        left = points_left(curve, total, photos)
        if left is None or left >= least_points:
            return None
        return (
            f"stopping after {visited} of {total} visits: {accuracy:.1%} is reached, and what is "
            f"left would bring at most {left:.1f} points (less than {least_points:g}), as far as "
            f"{photos} photos can tell"
        )


def points_left(curve: Curve, total: int, photos: int) -> float | None:
    """Return what a curve gains at most until `total` visits; None of too few points.

    Accuracy grows slower than the logarithm of the visits, so its slope over that in the later half
    is more than what comes; a standard error of the slope is added. photos: how many the accuracies
    are of: a few of them cannot tell half a point.
    """
    if len(curve) < _LEAST_POINTS:
        return None
    visits, accuracies = np.array(curve[-max(_LEAST_FITTED, (len(curve) + 1) // 2) :]).T
    spread = np.log(visits) - np.log(visits).mean()
    slope = float(spread @ accuracies / (spread @ spread))
    share = (photos * accuracies[-1] + 1) / (photos + 2)  # all right so far is not right for ever
    noise = math.sqrt(_BETWEEN_NEIGHBOURS * share * (1 - share) / photos)
    steepest = max(slope, 0.0) + noise / math.sqrt(spread @ spread)
    return 100 * steepest * math.log(total / visits[-1])


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return math.nan
