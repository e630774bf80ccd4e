"""Decisions of the CPU schedule's rules that may be tried otherwise.

A rule decides by the sizes it sees and two facts of a CPU. Caches, the ports of a core and what
LLVM makes of a loop decide too; where those matter, a measurement knows better.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from pbc.targets.tvm.cpu.loops import TASKS, Processor

# Rows and vectors of a register tile; accumulators and a row of columns have to fit. In the order
# of how often they were faster than the rule's own.
_TILES = (
    (4, 3), (8, 3), (4, 4), (6, 2), (8, 1), (6, 3),
    (8, 2), (12, 2), (6, 4), (4, 2), (12, 1), (14, 1),
)  # fmt: skip
_TASKS = (1, 2, 4, 32)
TILE, SHARES, LANES, WITHOUT = "tile", "tasks", "lanes", "without"


def knobs(processor: Processor, rules: Sequence[str]) -> dict[str, list[Any]]:
    """By name, what else may be tried.

    tile: rows and vectors in registers. tasks: how many shares each panel's work is cut into at
    least, each of which copies the panel again. lanes: shorter vectors. without: a rule that is
    left out, so that the next one that fits is taken.
    """
    fitting = [
        [rows, vectors] for rows, vectors in _TILES if (rows + 1) * vectors < processor.registers
    ]
    return {
        TILE: fitting,
        WITHOUT: list(rules),
        LANES: [processor.lanes // 2] if processor.lanes > 4 else [],
        SHARES: [tasks for tasks in _TASKS if tasks != TASKS],
    }


def adjusted(processor: Processor, settings: Mapping[str, Any]) -> Processor:
    """The CPU as a rule is to see it."""
    tile = settings.get(TILE)
    return replace(
        processor,
        lanes=settings.get(LANES, processor.lanes),
        tile=None if tile is None else (int(tile[0]), int(tile[1])),
        tasks=settings.get(SHARES, processor.tasks),
    )
