"""Products of matrices, and convolutions read as such, in register tiles.

A task copies the columns of one panel next to each other, once, then walks over its rows
with a tile of accumulators that stays in registers. Weights are read where they lie, one row at a
time, so nothing is packed ahead.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tvm import tirx

from pbc.targets.tvm.cpu.loops import (
    Processor,
    Sink,
    allocate,
    bound,
    ceiling,
    even_run,
    least,
    least_size,
    local,
    loop,
    nest,
    number,
    parallel,
    product,
    sequence,
    static_size,
    static_tail,
    unfold,
    vector,
)
from pbc.targets.tvm.cpu.matrices import Matrices, read_matrices, turn, widen
from pbc.targets.tvm.cpu.packing import Panel, fold
from pbc.targets.tvm.cpu.stages import Stage, substitute

# Rows of a tile by the vectors in one of its rows. No more than eight: rows of a power-of-two
# length fall on the same lines of an eight-way cache.
TILE_ROWS = {1: (8, 7, 6, 5, 4), 2: (8, 7, 6, 5, 4), 3: (8, 7, 6, 5, 4), 4: (6, 5, 4)}


def panels(stage: Stage, sink: Sink, processor: Processor) -> Any:
    """Panels of columns, tiles of rows."""
    matrices = read_matrices(stage)
    if matrices is None:
        return None
    if static_tail(matrices.reduced) == len(matrices.reduced):
        matrices = turn(matrices, processor)
    matrices = widen(stage, matrices, processor)
    writer = _Writer(stage, sink, processor, matrices)
    width, size = matrices.width, writer.vectors * processor.lanes
    if not isinstance(width, int):
        return writer.open_tasks(size)
    if width * 2 < processor.lanes:
        return None
    whole, rest = divmod(width, size)
    statements = []
    if whole:
        statements.append(writer.tasks(whole, 0, size, size))
    if rest:
        padded = -(-rest // processor.lanes) * processor.lanes
        statements.append(writer.tasks(1, whole * size, padded, rest))
    return sequence(statements)


@dataclass(frozen=True)
class _Writer:
    stage: Stage
    sink: Sink
    processor: Processor
    matrices: Matrices

    @property
    def vectors(self) -> int:
        """Vectors in a row of a tile: as wide as wastes no lanes, and leaves registers."""
        if self.processor.tile is not None:
            return self.processor.tile[1]
        if not isinstance(self.matrices.width, int):
            return 2
        needed = -(-self.matrices.width // self.processor.lanes)
        choices = (2, 3, 1) if self.processor.registers == 32 else (2, 1)
        return min(choices, key=lambda n: (n > needed, -(-needed // n) * n - needed > 1))

    def tile_rows(self, vectors: int) -> int:
        most = (self.processor.registers - 4) // vectors - 1
        fitting = [n for n in TILE_ROWS[vectors] if n <= most]
        height = self.matrices.height
        if self.processor.tile is not None:
            rows = self.processor.tile[0]
            return min(rows, height) if isinstance(height, int) else rows
        if isinstance(height, int):
            return next((n for n in fitting if height % n == 0), min(fitting[0], height))
        return fitting[0]

    def tasks(self, panels: int, offset: int, size: int, valid: int) -> Any:
        """Panels of `size` columns of which `valid` count, the first one at `offset`."""
        tall = self.tile_rows(size // self.processor.lanes)

        def task(outside: list[Any], first: Any, blocks: Any, panel: Any) -> Any:
            return self.panel(outside, first, blocks, tall, panel * size + offset, size, valid)

        return self.shared(tall, panels, task)

    def open_tasks(self, size: int) -> Any:
        """Panels of N columns that it takes; what is left goes one vector at a time."""
        tall, lanes = self.tile_rows(size // self.processor.lanes), self.processor.lanes
        width = self.matrices.width

        def task(outside: list[Any], first: Any, blocks: Any, panel: Any) -> Any:
            start = panel * size

            def narrow(part: Any) -> Any:
                own = start + part * lanes
                valid = tirx.min(number(lanes), width - own)
                return self.panel(outside, first, blocks, tall, own, lanes, valid)

            return tirx.IfThenElse(
                start + size <= width,
                self.panel(outside, first, blocks, tall, start, size, size),
                loop(ceiling(width - start, lanes), narrow, name="part"),
            )

        return self.shared(tall, ceiling(width, size), task)

    def shared(
        self, tall: int, panels: Any, task: Callable[[list[Any], Any, Any, Any], Any]
    ) -> Any:
        """Threads over panels; where those are few, each is cut into shares of its rows.

        Every share copies the panel again, so there are no more than keep the threads busy.
        """
        outer = [axis.extent for axis in self.matrices.outer]
        blocks = ceiling(self.matrices.height, tall)
        fewest = least_size(self.matrices.outer) * (panels if isinstance(panels, int) else 1)
        shares = least(ceiling(self.processor.tasks, product([*outer, panels])), blocks)
        if fewest >= self.processor.tasks:
            shares = 1
        elif not isinstance(shares, int):
            shares = tirx.max(shares, number(1))  # which it is; but TVM has to see that
        work = static_size(self.stage.axes) * static_size(self.stage.reduced)

        def cut(shares: Any) -> Any:
            each = ceiling(blocks, shares)

            def one(at: list[Any]) -> Any:
                *outside, share, panel = at
                return bound(
                    "first",
                    share * each,
                    lambda first: bound(
                        "blocks",
                        least(each, blocks - first),
                        lambda count: task(outside, first, count, panel),
                    ),
                )

            return parallel([*outer, shares, panels], one, work)

        return bound("shares", shares, cut)

    def panel(
        self,
        outside: list[Any],
        first: Any,
        blocks: Any,
        tall: int,
        start: Any,
        size: int,
        valid: Any,
    ) -> Any:
        reduced = [axis.extent for axis in self.matrices.reduced]
        packed = local([product(reduced), size], "packed")
        panel = Panel(self.matrices, self.processor, packed, outside, start, valid)
        walk = loop(
            blocks,
            lambda block: self.tile(packed, outside, (first + block) * tall, tall, start, valid),
            name="block",
        )
        return sequence([allocate(packed), panel.pack(), walk])

    def tile(
        self, packed: Any, outside: list[Any], top: Any, tall: int, start: Any, valid: Any
    ) -> Any:
        """One tile of accumulators over the whole reduction, and its results."""
        matrices, lanes = self.matrices, self.processor.lanes
        size = int(packed.shape[1].value)
        sums = [local([size], "sums") for _ in range(tall)]
        height = matrices.height
        exact = isinstance(height, int) and height % tall == 0

        def row_at(row: int) -> Any:
            return top + row if exact else tirx.min(top + row, number(height) - 1)

        def each(body: Callable[[int, Any], Any]) -> Any:
            return sequence(
                vector(lanes, lambda lane, row=row, at=at: body(row, at + lane))  # type: ignore[misc]
                for row in range(tall)
                for at in range(0, size, lanes)
            )

        def multiply(reduced: list[Any]) -> Any:
            place = fold(reduced, [axis.extent for axis in matrices.reduced])

            def one(row: int, column: Any) -> Any:
                places = matrices.places(outside, row_at(row), None, reduced)
                weight = substitute(matrices.row_load, places)
                value = sums[row][column] + weight * packed[place, column]
                return tirx.BufferStore(sums[row], value, [column])

            return each(one)

        def walk() -> Any:
            extents = [axis.extent for axis in matrices.reduced]
            if static_tail(matrices.reduced) < len(extents):
                return nest(extents, multiply, name="k")
            run = even_run(matrices.row_load, matrices.reduced)
            if run is None:
                return nest(extents, multiply, name="k")
            return nest(
                [product(extents) // run, run],
                lambda at: multiply(unfold(at[0] * run + at[1], extents)),
                name="k",
            )

        zero = tirx.const(0, "float32")
        finish = self.store_transposed if matrices.is_transposed else self.store_rows
        return sequence(
            [
                *(allocate(row) for row in sums),
                each(lambda row, at: tirx.BufferStore(sums[row], zero, [at])),
                walk(),
                finish(sums, outside, top, start, valid, exact),
            ]
        )

    def store(self, outside: list[Any], row: Any, column: Any, value: Any) -> Any:
        places = self.matrices.places(outside, row, column)
        axes = [places.get(axis.var, number(0)) for axis in self.stage.axes]
        return self.sink.store(axes, value)

    def store_rows(
        self, sums: list[Any], outside: list[Any], top: Any, start: Any, valid: Any, exact: bool
    ) -> Any:
        """Results that lie along the columns: whole vectors, and the rest one by one."""
        lanes = self.processor.lanes
        whole, rest = divmod(valid, lanes) if isinstance(valid, int) else (0, valid)
        has_rest = not isinstance(rest, int) or rest > 0
        last = local([lanes], "last")

        def one(row: int) -> Any:
            statements = [
                vector(
                    lanes,
                    lambda lane, at=at: self.store(  # type: ignore[misc]
                        outside, top + row, start + at + lane, sums[row][at + lane]
                    ),
                )
                for at in range(0, whole * lanes, lanes)
            ]
            if has_rest:
                at = whole * lanes
                statements += [
                    vector(
                        lanes, lambda lane: tirx.BufferStore(last, sums[row][lane + at], [lane])
                    ),
                    loop(
                        rest,
                        lambda lane: self.store(outside, top + row, start + at + lane, last[lane]),
                    ),
                ]
            stored = sequence(statements)
            inside = top + row < number(self.matrices.height)
            return stored if exact else tirx.IfThenElse(inside, stored, None)

        rows = [one(row) for row in range(len(sums))]
        return sequence([allocate(last), *rows] if has_rest else rows)

    def store_transposed(
        self, sums: list[Any], outside: list[Any], top: Any, start: Any, valid: Any, exact: bool
    ) -> Any:
        """Results that lie along the rows."""
        lanes, tall = self.processor.lanes, len(sums)
        size = int(sums[0].shape[0].value)
        results = local([size, tall], "results")

        def put(row: Any, column: Any) -> Any:
            return self.store(outside, top + row, start + column, results[column, row])

        def guarded(row: Any, column: Any) -> Any:
            return tirx.IfThenElse(top + row < number(self.matrices.height), put(row, column), None)

        def column_at(column: Any) -> Any:
            if exact and tall in (4, 8):
                return vector(tall, lambda row: put(row, column))
            return loop(tall, lambda row: put(row, column) if exact else guarded(row, column))

        return sequence(
            [
                allocate(results),
                *(
                    vector(
                        lanes,
                        lambda lane, row=row, at=at: tirx.BufferStore(  # type: ignore[misc]
                            results, sums[row][at + lane], [at + lane, row]
                        ),
                    )
                    for row in range(tall)
                    for at in range(0, size, lanes)
                ),
                loop(valid, column_at, name="column"),
            ]
        )
