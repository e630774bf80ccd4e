"""The ladder: level 0 is the original network, every further level a cheaper proxy of it."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from typing import Any

from pbc.errors import PbcError, UsageError

ORIGINAL = "original"
ALIGNED = "aligned"
UNALIGNED = "unaligned"

FLOAT32 = "float32"
BFLOAT16 = "bfloat16"
INT8 = "int8"

SGD = "sgd"
CLOSED = "closed"
"""Kinds of heads: learnt in steps, or solved for in closed form."""

MACS = "macs"
LATENCY = "latency"
PROFILE = "profile"


# Fields that bundles of earlier versions lack.
_LATER = {"merged_tokens"}


@dataclass(frozen=True)
class Level:
    """One rung: what running the frozen part at this level costs and how faithful it is.

    cost: relative to level 0, under the ladder's cost model (0 < cost <= 1 for level 0).
    latency_ms: of one training iteration of a batch (prefix forward, at the batch size that suits
        it, body forward and backward), None where it was not measured.
    macs: multiply-accumulates of prefix and body for one sample.
    fidelity: centred, standardised cosine to level 0 on held-out calibration images
        (docs/architecture.md, «Fidelity»); None for a level that was never aligned.
    status: "original", "aligned" or "unaligned".
    precision: in which the frozen part computes, "float32", "bfloat16" or "int8" (the prefix alone,
        whose graph says where it rounds).
    resolution: height and width that the images are reduced to first; None leaves them alone.
    accuracy_loss: points of accuracy that training at this level alone costs on pseudo-tasks;
        None where it was not measured.
    merged_tokens: how many of a transformer's tokens become one with others on the way.
    """

    level: int
    cost: float
    latency_ms: float | None
    macs: float
    fidelity: float | None
    status: str
    precision: str = FLOAT32
    resolution: tuple[int, int] | None = None
    accuracy_loss: float | None = None
    merged_tokens: int = 0


@dataclass(frozen=True)
class Ladder:
    """All levels, cheapest last, and the cost model their costs come from.

    cost_model: MACS, LATENCY (measured where it was compiled) or PROFILE (predicted from what the
    device measured of an earlier ladder).
    """

    levels: tuple[Level, ...] = ()
    cost_model: str = MACS

    def __len__(self) -> int:
        return len(self.levels)

    def require(self, level: int) -> int:
        """Return the number of a level; raises UsageError where there is none."""
        if not 0 <= level < len(self):
            raise UsageError(f"no level {level}; this model has levels 0 to {len(self) - 1}")
        return level

    def precision(self, level: int) -> str:
        """Return what the frozen part of a level computes in; float32 where nothing is planned."""
        return self.levels[level].precision if level < len(self) else FLOAT32

    def resolution(self, level: int) -> tuple[int, int] | None:
        """Return what the images are reduced to at a level; None where nothing is planned."""
        return self.levels[level].resolution if level < len(self) else None

    def to_json(self) -> list[dict[str, Any]]:
        return [asdict(level) for level in self.levels]

    @staticmethod
    def from_json(rows: list[dict[str, Any]], cost_model: str) -> Ladder:
        """Read the manifest's `levels`; raises PbcError when they are not a ladder."""
        names = {field.name for field in fields(Level)}
        for row in rows:
            if not names - _LATER <= set(row) <= names:
                raise PbcError(
                    f"a level in the manifest has the fields {sorted(row)}; "
                    f"expected {sorted(names)}"
                )
        levels = tuple(
            Level(**{**row, "resolution": row["resolution"] and tuple(row["resolution"])})
            for row in rows
        )
        if [level.level for level in levels] != list(range(len(levels))) or not levels:
            raise PbcError(
                f"the manifest's levels are {[level.level for level in levels]}; "
                "expected 0, 1, 2, …"
            )
        return Ladder(levels, cost_model)
