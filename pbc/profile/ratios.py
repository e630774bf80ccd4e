"""Ratios of measured times: how many times as fast each level is."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pbc.profile.task import COMPILED, EAGER, level_name

Json = dict[str, Any]


def best_prefix(side: Json) -> tuple[float, int]:
    """Return the least ms per image of the prefix, and the samples per call; zeros without one."""
    calls = ((times["min"], int(size)) for size, times in side["prefix"].items())
    return min(calls, default=(0.0, 0))


def image_ms(side: Json, batch: int) -> float:
    """Return the time of an image from pixels to new parameters, in ms."""
    return best_prefix(side)[0] + float(side["step"]["min"]) / batch


def ratios(sides: Mapping[str, Json], batch: int) -> dict[str, dict[str, float]]:
    """Return how many times as fast each level is, by the least times.

    Level 0 as PyTorch at its best, for each stage the faster of its ways; the others as level 0.
    """
    rivals = [sides[name] for name in (EAGER, COMPILED) if name in sides]
    first = sides.get(level_name(0))
    found = {}
    for name, side in sides.items():
        against = rivals if side is first else [first] if first is not None else []
        if side in rivals or not against:
            continue
        prefix = best_prefix(side)[0]
        step = side["step"]["min"]
        slower_prefix = min(best_prefix(other)[0] for other in against)
        slower_step = min(other["step"]["min"] for other in against)
        found[name] = {
            **({"prefix": slower_prefix / prefix} if prefix else {}),
            "step": slower_step / step,
            "total": (slower_prefix + slower_step / batch) / image_ms(side, batch),
        }
    return found
