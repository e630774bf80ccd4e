"""Plan the ladder: how far which dimensions shrink at each level."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np

from pbc import registry
from pbc.atomic import replace_bytes
from pbc.dims import HEADS, Dimension, Dims
from pbc.emit import emit
from pbc.ladder import ORIGINAL, UNALIGNED, Ladder, Level
from pbc.program import Program, body, op_name, prefix
from pbc.work import work_file

Sizes = dict[str, int]

# Common widths at which a latency is measured; between them it is interpolated.
MEASURED_WIDTHS = np.linspace(0.1, 1.0, 10)
# MACs follow from the sizes, at any width.
COUNTED_WIDTHS = np.linspace(0.1, 1.0, 181)


@dataclass(frozen=True)
class PlanLevels:
    """Choose every level's sizes so that costs fall in even steps.

    The steps lead down to `min_cost`, or to the cheapest cost in reach. All independent dimensions
    shrink by one common width per level, rounded to `rounding` (0 means 16 where there are
    depthwise convolutions, else 8); of an attention the head size shrinks, the number of heads
    stays. Cost is latency measured here when this machine is the target, MACs otherwise. Graphs
    stay as they are; `program.ladder` and `program.sizes` are filled. A level that rounding makes
    equal to the one above is dropped and noted. Without independent dimensions level 0 is the only
    one.
    """

    levels: int = 4
    min_cost: float = 0.3
    rounding: int = 0
    stage: ClassVar[str] = "plan"

    def __call__(self, program: Program) -> Program:
        dims = program.dims
        assert dims is not None
        count = self.levels if dims.independent() else 0
        rounding = self.rounding or (16 if has_depthwise(program) else 8)

        def sizes_at(width: float) -> Sizes:
            return uniform_sizes(dims, width, rounding)

        widths = MEASURED_WIDTHS if program.target.local else COUNTED_WIDTHS
        costs = self._costs(program, dims, widths, sizes_at) if count else np.ones(len(widths))
        plans: list[Sizes] = [{}]
        expected = [1.0]
        notes = program.notes
        cheapest = max(self.min_cost, float(costs[0]))
        for level in range(1, count + 1):
            target = 1 - level * (1 - cheapest) / count
            width = float(np.interp(target, costs, widths))
            sizes = sizes_at(width)
            if sizes == plans[-1]:
                notes += (f"level {level} of {count} is dropped: it rounds to the level above it",)
                continue
            plans.append(sizes)
            # MACs follow from the sizes; a latency is read off between the widths measured.
            measured = float(np.interp(width, widths, costs))
            expected.append(measured if program.target.local else dims.macs(sizes) / dims.macs())
        if count and cheapest > self.min_cost:
            notes += (
                f"a cost of {self.min_cost:.2f} is out of reach: a tenth of every width still "
                f"costs {cheapest:.2f}, so the levels step down to that",
            )
        levels = tuple(
            Level(
                level=number,
                cost=cost,
                latency_ms=None,
                macs=dims.macs(sizes),
                fidelity=1.0 if number == 0 else None,
                status=ORIGINAL if number == 0 else UNALIGNED,
            )
            for number, (cost, sizes) in enumerate(zip(expected, plans, strict=True))
        )
        ladder = Ladder(levels, "latency" if program.target.local else "macs")
        return replace(program.copy(), ladder=ladder, sizes=tuple(plans), notes=notes)

    def _costs(
        self,
        program: Program,
        dims: Dims,
        widths: np.ndarray,
        sizes_at: Callable[[float], Sizes],
    ) -> np.ndarray:
        """Relative cost at each of the widths, never falling."""
        sizes = [sizes_at(float(width)) for width in widths]
        if program.target.local:
            absolute = np.array(self._latencies_ms(program, dims, sizes))
        else:
            absolute = np.array([dims.macs(at_width) for at_width in sizes])
        return np.maximum.accumulate(absolute / absolute[-1]).clip(max=1.0)

    def _latencies_ms(self, program: Program, dims: Dims, sizes: list[Sizes]) -> list[float]:
        """Measure; keep the result, since a resumed compilation must come to the same plan."""
        decided_by = [sizes, program.batch, program.engine]
        kept = work_file(program, "latencies", decided_by, (prefix(0), body(0)), ".json")
        measured: list[float]
        if kept is not None and kept.is_file():
            with contextlib.suppress(ValueError):  # damaged: measure again
                measured = json.loads(kept.read_text())
                return measured
        candidates = []
        for at_width in sizes:
            # Which indices stay changes no latency, so the first ones stand for all.
            keep = {name: list(range(size)) for name, size in at_width.items()}
            candidates.append(
                {
                    name: emit(graph, dims, keep, shapes=False)
                    for name, graph in program.graphs.items()
                }
            )
        lowering = registry.load("pbc.lowerings", program.engine)()
        measured = lowering.latency_ms(program, candidates)
        if kept is not None:
            replace_bytes(kept, json.dumps(measured).encode())
        return measured


def uniform_sizes(dims: Dims, width: float, rounding: int) -> Sizes:
    """The size of every independent dimension at a common width; unshrunk ones are left out."""
    sizes = {}
    for dimension in dims.independent():
        size = rounded(dimension, width, rounding)
        if size < dimension.size:
            sizes[dimension.name] = size
    return sizes


def rounded(dimension: Dimension, width: float, rounding: int) -> int:
    """A dimension's size at a width: a multiple of `rounding`, at least one, at most its own."""
    if dimension.kind == HEADS:
        return dimension.size
    size = int(dimension.size * width / rounding + 0.5) * rounding
    return min(dimension.size, max(rounding, size))


def has_depthwise(program: Program) -> bool:
    """Whether a convolution runs channel by channel; such layers like wider blocks of channels."""
    return any(
        op_name(node) == "aten.conv2d.default" and len(node.args) > 6 and node.args[6] != 1
        for graph in program.graphs.values()
        for node in graph.graph.nodes
    )
