"""Stages of several sides, timed in turn: whatever else the machine does slows all alike."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from time import perf_counter
from typing import Any

_WARM_UPS = 3
# Steps that count in each round, after one that does not.
_REPEATS = 3
# A step this long feels nothing of what ran before it, and is not measured more than once a turn.
_LONG_MS = 500.0

Call = Callable[[], object]


@dataclass(frozen=True)
class Side:
    """One party of the comparison: a level of the bundle, or a way to run PyTorch.

    prefix: a call for each number of samples; empty without a prefix. step: forward, then update.
    logits: None where it is not measured.
    """

    name: str
    prefix: Mapping[int, Call]
    forward: Call
    update: Call
    logits: Call | None = None


@dataclass
class _Times:
    """The times of one stage, in milliseconds."""

    milliseconds: list[float] = field(default_factory=list)

    def to_json(self, scale: float = 1.0) -> dict[str, float]:
        return {
            "min": min(self.milliseconds) * scale,
            "median": statistics.median(self.milliseconds) * scale,
        }


def in_turn(sides: Sequence[Side], rounds: int) -> dict[str, dict[str, Any]]:
    """Time every stage of every side in every round, the same stage of all sides side by side.

    `prefix` is in ms per image by the size of
    the call, everything else in ms per call: `step` is forward and update together.
    """
    found: dict[tuple[str, str], _Times] = {}

    def add(side: Side, stage: str, took_ms: float) -> None:
        found.setdefault((side.name, stage), _Times()).milliseconds.append(took_ms)

    warm_ups = _WARM_UPS
    slow: set[str] = set()
    turn = 0
    while turn < warm_ups + rounds:
        first = turn % len(sides)  # who begins meets what others left in the CPU's caches
        order = [*sides[first:], *sides[:first]]
        for size in sorted({size for side in sides for size in side.prefix}):
            for side in order:
                if size in side.prefix:
                    add(side, f"prefix {size}", milliseconds(side.prefix[size]))
        for side in order:
            if side.name not in slow:
                side.forward()  # uncounted: a short step must not pay for what ran before
                side.update()
            for _ in range(1 if side.name in slow else _REPEATS):
                forward, update = milliseconds(side.forward), milliseconds(side.update)
                add(side, "forward", forward)
                add(side, "update", update)
                add(side, "step", forward + update)
        for side in order:
            if side.logits is not None:
                if side.name not in slow:
                    side.logits()
                for _ in range(1 if side.name in slow else _REPEATS):
                    add(side, "logits", milliseconds(side.logits))
        turn += 1
        slow = {s.name for s in sides if min(found[s.name, "step"].milliseconds) > _LONG_MS}
        if len(slow) == len(sides):
            warm_ups = min(warm_ups, turn)
        if turn == warm_ups:
            found.clear()
    return {
        side.name: {
            "prefix": {
                str(size): found[side.name, f"prefix {size}"].to_json(1 / size)
                for size in side.prefix
            },
            **{
                stage: found[side.name, stage].to_json()
                for stage in ("forward", "update", "step", "logits")
                if (side.name, stage) in found
            },
        }
        for side in sides
    }


def milliseconds(call: Call) -> float:
    """Return the time that one call takes, in ms."""
    begin = perf_counter()
    call()
    return 1e3 * (perf_counter() - begin)
