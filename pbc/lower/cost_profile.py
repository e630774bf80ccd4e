"""A device's profile as a cost model: a level costs what measured levels near it took there.

For each precision, the measured levels are points of a curve, from a share of level 0's
multiply-accumulates to a share of its time. Between two points it is a straight line; it never
falls where the work grows; below the cheapest point its last piece goes on, though never below
what would be in proportion to the work.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pbc.bundle.ladder import FLOAT32
from pbc.errors import PbcError
from pbc.frontend.origin import without_folder
from pbc.ir.program import Program
from pbc.util import strict_json

# Rounding to whole channels puts a level this far beside the one it was planned as.
_NEAR = 0.98

Points = Sequence[tuple[float, float]]


@dataclass(frozen=True)
class CostProfile:
    """A measurement of a bundle's levels by `pbc profile`, all relative to level 0.

    facts: of the bundle, by the words that a refusal uses. curves: by precision, points of rising
    work.
    """

    path: Path
    facts: Mapping[str, Any]
    curves: Mapping[str, Points]

    @classmethod
    def open(cls, path: Path) -> CostProfile:
        """Read what `pbc profile -o` wrote; raises PbcError for anything else."""
        try:
            content = strict_json.load(path)
        except (OSError, ValueError) as error:
            raise PbcError(f"the profile {path} cannot be read: {error}") from error
        try:
            return cls._of(path, content)
        except (KeyError, TypeError, ValueError, IndexError) as error:
            raise PbcError(
                f"{path} is no profile of a ladder; expected what `pbc profile BUNDLE -o` writes"
            ) from error

    @classmethod
    def _of(cls, path: Path, content: Mapping[str, Any]) -> CostProfile:
        bundle = content["bundle"]
        # Training takes all processors unless it is told otherwise.
        measured = max(content["level_costs"], key=lambda run: int(run["threads"]))
        iterations = {
            int(row["level"]): float(row["prefix_ms"] + row["forward_ms"] + row["update_ms"])
            for row in measured["levels"]
        }
        if 0 not in iterations:
            raise PbcError(f"the profile {path} has no level 0, to which others are compared")
        rows = {int(row["level"]): row for row in bundle["levels"]}
        if not all(ms > 0 for ms in iterations.values()):
            raise ValueError("a level without a time")
        whole = float(rows[0]["macs"])
        points: dict[str, list[tuple[float, float]]] = {}
        for level, ms in iterations.items():
            point = (float(rows[level]["macs"]) / whole, ms / iterations[0])
            points.setdefault(str(rows[level]["precision"]), []).append(point)
        return cls(
            path,
            {
                "model": bundle["model"],
                "strategy": bundle["strategy"],
                "target": bundle["target"],
                "engine": bundle["engine"],
                "input": "x".join(str(int(size)) for size in bundle["input"]),
                "batch": int(measured["batch"]),
            },
            {precision: rising(found) for precision, found in points.items()},
        )

    def check(self, program: Program) -> None:
        """Refuse a profile of something else than is being compiled."""
        request = program.request
        compiled = {
            "model": without_folder(program.network.name),
            "strategy": request.strategy,
            "target": request.target.name,
            "engine": request.engine,
            "input": "x".join(str(size) for size in program.network.input.shape),
            "batch": request.batch,
        }
        for fact, value in compiled.items():
            if self.facts[fact] != value:
                raise PbcError(
                    f"the profile {self.path} is of {fact} {self.facts[fact]}, this compiles for "
                    f"{value}: profile a bundle that was compiled with the same options"
                )

    def measured(self, precision: str) -> bool:
        """Whether a level of the precision was measured."""
        return precision in self.curves

    def extrapolated(self, share: float, precision: str) -> bool:
        """Whether so little work was not measured, nor anything near it."""
        return share < _NEAR * self.curves[precision][0][0]

    def cost(self, share: float, precision: str = FLOAT32) -> float:
        """Time relative to level 0's, of so much of its multiply-accumulates."""
        points = self.curves.get(precision, [(1.0, 1.0)])
        work, time = np.array(points).T
        if share >= work[0]:
            return float(np.interp(share, work, time))
        in_proportion = float(time[0] * share / work[0])
        if len(points) == 1:
            return in_proportion
        slope = float((time[1] - time[0]) / (work[1] - work[0]))
        return max(in_proportion, float(time[0]) - slope * (float(work[0]) - share))


def rising(points: Iterable[tuple[float, float]]) -> list[tuple[float, float]]:
    """Sort points by work; where more work took less time, all of them took the mean.

    Points of the same work become one.
    """
    by_work: dict[float, list[float]] = {}
    for work, time in points:
        by_work.setdefault(work, []).append(time)
    blocks: list[tuple[list[float], list[float]]] = []
    for work in sorted(by_work):
        blocks.append(([work], by_work[work]))
        while len(blocks) > 1 and np.mean(blocks[-2][1]) > np.mean(blocks[-1][1]):
            works, times = blocks.pop()
            blocks[-1] = (blocks[-1][0] + works, blocks[-1][1] + times)
    return [(work, float(np.mean(times))) for works, times in blocks for work in works]
