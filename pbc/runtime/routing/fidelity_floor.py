"""From the points of accuracy that a user is willing to lose to a fidelity floor."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

from pbc.runtime.options import TrainOptions

# What a bundle without a map gets: aligned proxies of this fidelity lost less than a point.
DEFAULT_FLOOR = 0.95

Points = Sequence[Sequence[float]]


def floor_for(points: Points, most_lost: float) -> float:
    """Return the smallest fidelity whose interpolated loss is at most `most_lost` points.

    points: (fidelity, points of accuracy lost), ascending in fidelity. The least faithful one is
    the mean of a level, about which samples lie on both sides: where that level's loss is within
    the bound, the floor is as far below the mean as the mean is below one, so that none of its
    usual samples is held back. Further down nothing is known.
    """
    floor = 1.0
    for (low, low_lost), (high, high_lost) in reversed(list(pairwise(points))):
        if high_lost > most_lost:
            return floor
        if low_lost > most_lost:
            share = (most_lost - high_lost) / (low_lost - high_lost)
            return high - share * (high - low)
        floor = low
    return max(0.0, 2 * floor - 1)


def lost_at(points: Points, fidelity: float) -> float:
    """Return the interpolated points lost at a fidelity; outside, those of the nearest point."""
    for (low, low_lost), (high, high_lost) in pairwise(points):
        if fidelity <= low:
            return low_lost
        if fidelity <= high:
            return low_lost + (high_lost - low_lost) * (fidelity - low) / (high - low)
    return points[-1][1]


def fidelity_floor(manifest: Mapping[str, Any], options: TrainOptions) -> tuple[float, str | None]:
    """Return the floor of a run, and what the user should know about where it comes from."""
    if options.fidelity_floor is not None:
        return options.fidelity_floor, None
    points = manifest.get("accuracy_map")
    if points:
        floor = floor_for(points, options.max_accuracy_loss)
        return min([floor, *_floors_of_mean(manifest, floor)]), None
    return DEFAULT_FLOOR, (
        "the bundle has no map from fidelity to accuracy: "
        f"the fidelity floor is {DEFAULT_FLOOR:g} instead of one derived from "
        f"--max-accuracy-loss {options.max_accuracy_loss:g}"
    )


def _floors_of_mean(manifest: Mapping[str, Any], fidelity: float) -> list[float]:
    """Return the floors that a policy which tells samples apart needs for a mean fidelity.

    The map speaks of means. Without such a policy a level's mean is all that is known of a sample;
    with it most samples lie far above the floor, so that a lower one keeps the mean.
    """
    report = (manifest.get("policy") or {}).get("report") or {}
    return [floor for floor, mean in report.get("mixes", ()) if mean >= fidelity]
