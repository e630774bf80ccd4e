"""Plan the ladder: how far which dimensions shrink at each level."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np

from pbc import registry
from pbc.dims import HEADS, Dimension, Dims
from pbc.emit import emit
from pbc.ladder import ORIGINAL, UNALIGNED, Ladder, Level
from pbc.program import Program, op_name

Sizes = dict[str, int]

# Common widths at which costs are taken; between them they are interpolated.
WIDTHS = np.array([0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0])


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

        costs = self._costs(program, dims, sizes_at) if count else np.ones(len(WIDTHS))
        plans: list[Sizes] = [{}]
        expected = [1.0]
        notes = program.notes
        cheapest = max(self.min_cost, float(costs[0]))
        for level in range(1, count + 1):
            target = 1 - level * (1 - cheapest) / count
            width = float(np.interp(target, costs, WIDTHS))
            sizes = sizes_at(width)
            if sizes == plans[-1]:
                notes += (f"level {level} of {count} is dropped: it rounds to the level above it",)
                continue
            plans.append(sizes)
            expected.append(float(np.interp(width, WIDTHS, costs)))
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
        self, program: Program, dims: Dims, sizes_at: Callable[[float], Sizes]
    ) -> np.ndarray:
        """Relative cost at each of WIDTHS, never falling."""
        if program.target.local:
            candidates = []
            for width in WIDTHS:
                # Which indices stay changes no latency, so the first ones stand for all.
                keep = {name: list(range(size)) for name, size in sizes_at(width).items()}
                graphs = {name: emit(graph, dims, keep) for name, graph in program.graphs.items()}
                candidates.append(graphs)
            lowering = registry.load("pbc.lowerings", program.engine)()
            absolute = np.array(lowering.latency_ms(program, candidates))
        else:
            absolute = np.array([dims.macs(sizes_at(width)) for width in WIDTHS])
        return np.maximum.accumulate(absolute / absolute[-1]).clip(max=1.0)


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
