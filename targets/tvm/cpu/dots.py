"""Products of matrices one of which is thin: dot products, in vectors along the reduction.

A linear layer of few samples, or a convolution of one pixel: weights are read once, along their
rows, and there are too few columns to fill vectors with.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from tvm import tirx

from pbc.targets.tvm.cpu.loops import (
    Processor,
    Sink,
    across,
    allocate,
    ceiling,
    fused_stride,
    least_size,
    local,
    loop,
    number,
    parallel,
    product,
    sequence,
    static_size,
    static_tail,
    unfold,
    vector,
)
from pbc.targets.tvm.cpu.matrices import Matrices, read_matrices
from pbc.targets.tvm.cpu.stages import Stage, substitute

TILE = 4


def dots(stage: Stage, sink: Sink, processor: Processor) -> Any:
    """Tiles of dot products, where both tensors store what is summed next to each other."""
    matrices = read_matrices(stage)
    if matrices is None or static_tail(matrices.reduced) < len(matrices.reduced):
        return None
    fewest = min(least_size(matrices.rows), least_size((*matrices.open, *matrices.columns)))
    thin = fewest * 2 < processor.lanes
    if not thin or static_size(matrices.reduced) < processor.lanes:
        return None
    loads = matrices.row_load, matrices.column_load
    if any(fused_stride(load, matrices.reduced) != 1 for load in loads):
        return None
    return _Writer(stage, sink, processor, matrices).write()


@dataclass(frozen=True)
class _Writer:
    stage: Stage
    sink: Sink
    processor: Processor
    matrices: Matrices

    def write(self) -> Any:
        matrices = self.matrices
        height, width = matrices.height, matrices.width
        tall = TILE if not isinstance(height, int) else min(TILE, height)
        wide = min(TILE, width)
        outer = [axis.extent for axis in matrices.outer]
        work = static_size(self.stage.axes) * static_size(matrices.reduced)
        if static_size(matrices.rows) > width:
            return parallel(
                [*outer, ceiling(height, tall)],
                lambda at: loop(
                    ceiling(width, wide),
                    lambda column: self.tile(at[:-1], at[-1] * tall, column * wide, tall, wide),
                ),
                work,
            )
        return parallel(
            [*outer, ceiling(width, wide)],
            lambda at: loop(
                ceiling(height, tall),
                lambda row: self.tile(at[:-1], row * tall, at[-1] * wide, tall, wide),
            ),
            work,
        )

    def tile(self, outside: Sequence[Any], top: Any, left: Any, tall: int, wide: int) -> Any:
        matrices, lanes = self.matrices, self.processor.lanes
        extents = [axis.extent for axis in matrices.reduced]
        count = product(extents)
        sums = {
            (row, column): local([lanes], "sums") for row in range(tall) for column in range(wide)
        }

        def clamped(start: Any, step: Any, size: int, limit: Any) -> Any:
            if isinstance(limit, int) and limit % size == 0:
                return start + step
            return tirx.min(start + step, number(limit) - 1)

        def each(body: Callable[[int, int, Any], Any]) -> Any:
            return sequence(
                vector(lanes, lambda lane, row=row, column=column: body(row, column, lane))  # type: ignore[misc]
                for row, column in sums
            )

        def term(row: Any, column: Any, index: Any) -> Any:
            places = matrices.places(
                outside,
                clamped(top, row, tall, matrices.height),
                clamped(left, column, wide, matrices.width),
                unfold(index, extents),
            )
            first = substitute(matrices.row_load, places)
            return first * substitute(matrices.column_load, places)

        def add(into: Any, lane: Any, value: Any) -> Any:
            return tirx.BufferStore(into, into[lane] + value, [lane])

        def finish(row: int, column: int) -> Any:
            total = sums[row, column]
            places = matrices.places(outside, top + row, left + column)
            axes = [places.get(axis.var, number(0)) for axis in self.stage.axes]
            inside = tirx.all(
                top + row < number(matrices.height), left + column < number(matrices.width)
            )
            statements = []
            if count % lanes:
                whole = count // lanes * lanes
                statements.append(
                    loop(count % lanes, lambda rest: add(total, 0, term(row, column, rest + whole)))
                )
            stored = self.sink.store(axes, across(total, lanes, operator.add))
            return sequence([*statements, tirx.IfThenElse(inside, stored, None)])

        zero = tirx.const(0, "float32")
        return sequence(
            [
                *(allocate(one) for one in sums.values()),
                each(lambda row, column, lane: tirx.BufferStore(sums[row, column], zero, [lane])),
                loop(
                    count // lanes,
                    lambda part: each(
                        lambda row, column, lane: add(
                            sums[row, column], lane, term(row, column, part * lanes + lane)
                        )
                    ),
                ),
                *(finish(row, column) for row, column in sums),
            ]
        )
