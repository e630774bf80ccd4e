"""The levels of a personal model for people: accuracy against the time that an answer takes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pbc.bench.report import charts
from pbc.bench.report.page import table


def accuracy_by_time(tried: Sequence[Mapping[str, Any]], deployed: int, words: str) -> str:
    """Return a chart and a table of levels; nothing of fewer than two.

    tried: level, accuracy in 0…1 and sample_ms of each, level 0 first. words: how it was measured.
    """
    if len(tried) < 2:
        return ""
    first = tried[0]["sample_ms"]
    points, rows = [], [["level", "accuracy", "ms a photo", "speed"]]
    for one in tried:
        name = f"level {one['level']}{' (deployed)' if one['level'] == deployed else ''}"
        accuracy, faster = f"{one['accuracy']:.1%}", f"{first / one['sample_ms']:.2f}×"
        rows.append([name, accuracy, f"{one['sample_ms']:.2f}", faster])
        title = f"{name}: {accuracy} at {faster} the speed of level 0"
        points.append((f"level {one['level']}", title, one["sample_ms"], 100 * one["accuracy"]))
    low = min(100 * one["accuracy"] for one in tried)
    chart = charts.scatter(points, "ms a photo", "accuracy, %", low - 1)
    return f"<p>{words}</p>{chart}{table(rows, marked=deployed)}"
