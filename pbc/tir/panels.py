"""Products of matrices, and convolutions read as such, in register tiles.

A sum of products whose one tensor does not depend on the last axes of the result (its *rows*) and
whose other does (its *columns*): a convolution has the output channels as rows and the pixels as
columns. A task copies the columns of one panel next to each other, once, then walks over its rows
with a tile of accumulators that stays in registers. Weights are read where they lie, one row at a
time, so nothing is packed ahead.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tvm import tirx

from pbc.tir.loops import (
    TASKS,
    Processor,
    Sink,
    allocate,
    ceiling,
    fused_stride,
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
    unrolled,
    vector,
)
from pbc.tir.stages import Axis, Stage, is_product, loads, substitute, variables

# Rows of a tile by the vectors in one of its rows. No more than eight: rows of a power-of-two
# length fall on the same lines of an eight-way cache.
TILE_ROWS = {1: (8, 7, 6, 5, 4), 2: (8, 7, 6, 5, 4), 3: (8, 7, 6, 5, 4), 4: (6, 5, 4)}


@dataclass(frozen=True)
class Matrices:
    """The axes of a sum of products by what they index, and the two tensors."""

    outer: tuple[Axis, ...]
    rows: tuple[Axis, ...]
    columns: tuple[Axis, ...]
    reduced: tuple[Axis, ...]
    row_load: Any
    column_load: Any
    turned: bool = False
    """Whether the result stores its rows, not its columns, next to each other."""

    @property
    def width(self) -> int:
        return static_size(self.columns)

    @property
    def height(self) -> Any:
        return product([axis.extent for axis in self.rows])

    def places(
        self, outside: Sequence[Any], row: Any, column: Any, reduced: Sequence[Any] | None = None
    ) -> dict[Any, Any]:
        """What each axis is at a row and a column, both fused; what is None is left out."""
        found = {a.var: at for a, at in zip(self.outer, outside, strict=True)}
        for axes, index in ((self.rows, row), (self.columns, column)):
            if index is not None:
                indices = unfold(index, [axis.extent for axis in axes])
                found.update((a.var, at) for a, at in zip(axes, indices, strict=True))
        if reduced is not None:
            found.update((a.var, at) for a, at in zip(self.reduced, reduced, strict=True))
        return found


def read_matrices(stage: Stage) -> Matrices | None:
    """How a stage is a product of matrices, if it is one."""
    if not is_product(stage) or any(str(v.source.dtype) != "float32" for v in loads(stage.value)):
        return None
    first, second = stage.value.a, stage.value.b
    in_first, in_second = variables(list(first.indices)), variables(list(second.indices))
    if any(a.var not in in_first or a.var not in in_second for a in stage.reduced if a.length != 1):
        return None
    only_first = [a for a in stage.axes if a.var in in_first - in_second and a.length != 1]
    only_second = [a for a in stage.axes if a.var in in_second - in_first and a.length != 1]
    if not only_first or not only_second:
        return None
    if stage.axes.index(only_first[-1]) > stage.axes.index(only_second[-1]):
        rows, columns, row_load, column_load = only_second, only_first, second, first
    else:
        rows, columns, row_load, column_load = only_first, only_second, first, second
    known = static_tail(columns)
    taken = [*rows, *columns[len(columns) - known :]]
    return Matrices(
        tuple(axis for axis in stage.axes if axis not in taken),
        tuple(rows),
        tuple(columns[len(columns) - known :]),
        stage.reduced,
        row_load,
        column_load,
    )


def turn(matrices: Matrices, processor: Processor) -> Matrices:
    """Rows for columns, where the columns lie along the reduction as a layer's weights do.

    Copying the few rows is less work than turning the weights.
    """
    known = static_tail(matrices.rows)
    columns = matrices.rows[len(matrices.rows) - known :]
    if (
        static_size(columns) * 2 < processor.lanes
        or fused_stride(matrices.column_load, matrices.columns) == 1
        or fused_stride(matrices.column_load, matrices.reduced) != 1
    ):
        return matrices
    return Matrices(
        (*matrices.outer, *matrices.rows[: len(matrices.rows) - known]),
        matrices.columns,
        columns,
        matrices.reduced,
        matrices.column_load,
        matrices.row_load,
        turned=True,
    )


def panels(stage: Stage, sink: Sink, processor: Processor) -> Any:
    """Panels of columns, tiles of rows."""
    matrices = read_matrices(stage)
    if matrices is None or matrices.width * 2 < processor.lanes:
        return None
    if static_tail(matrices.reduced) == len(matrices.reduced):
        matrices = turn(matrices, processor)
    writer = _Writer(stage, sink, processor, matrices)
    vectors = writer.vectors
    size = vectors * processor.lanes
    whole, rest = divmod(matrices.width, size)
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
        needed = -(-self.matrices.width // self.processor.lanes)
        choices = (2, 3, 1) if self.processor.registers == 32 else (2, 1)
        return min(choices, key=lambda n: (n > needed, -(-needed // n) * n - needed > 1))

    def tile_rows(self, vectors: int) -> int:
        most = (self.processor.registers - 4) // vectors - 1
        fitting = [n for n in TILE_ROWS[vectors] if n <= most]
        height = self.matrices.height
        if isinstance(height, int):
            return next((n for n in fitting if height % n == 0), min(fitting[0], height))
        return fitting[0]

    def tasks(self, panels: int, offset: int, size: int, valid: int) -> Any:
        """Panels of `size` columns of which `valid` count, the first one at `offset`."""
        vectors = size // self.processor.lanes
        tall = self.tile_rows(vectors)
        blocks = ceiling(self.matrices.height, tall)
        outer = [axis.extent for axis in self.matrices.outer]
        shares = 1
        if isinstance(blocks, int):
            shares = next(
                (n for n in range(1, blocks + 1) if blocks % n == 0 and n * panels >= TASKS), blocks
            )
            blocks //= shares

        def task(at: list[Any]) -> Any:
            *outside, share, panel = at
            return self.panel(
                outside,
                share * blocks if shares > 1 else number(0),
                blocks,
                tall,
                panel * size + offset,
                size,
                valid,
            )

        return parallel(
            [*outer, shares, panels],
            task,
            static_size(self.stage.axes) * static_size(self.stage.reduced),
        )

    def panel(
        self,
        outside: list[Any],
        first: Any,
        blocks: Any,
        tall: int,
        start: Any,
        size: int,
        valid: int,
    ) -> Any:
        reduced = [axis.extent for axis in self.matrices.reduced]
        packed = local([product(reduced), size], "packed", scope="global")
        pack = nest(
            reduced,
            lambda at: self.pack(packed, outside, at, start, size, valid),
            name="k",
        )
        walk = loop(
            blocks,
            lambda block: self.tile(packed, outside, (first + block) * tall, tall, start, valid),
            name="block",
        )
        return sequence([allocate(packed), pack, walk])

    def pack(
        self, packed: Any, outside: list[Any], reduced: list[Any], start: Any, size: int, valid: int
    ) -> Any:
        """Copy the columns of one panel for one point of the reduction."""
        matrices, lanes = self.matrices, self.processor.lanes
        place = fold(reduced, [axis.extent for axis in matrices.reduced])

        def copy(at: Any, column: Any) -> Any:
            places = matrices.places(outside, None, column, reduced)
            return tirx.BufferStore(packed, substitute(matrices.column_load, places), [place, at])

        if valid < size:
            last = number(matrices.width - 1)
            return loop(size, lambda at: copy(at, tirx.min(start + at, last)))
        run = lanes
        if fused_stride(matrices.column_load, matrices.columns) is None:
            inner = matrices.columns[-1].length or 1
            while run > 1 and (inner % run or size % run):
                run //= 2
        return loop(
            size // run,
            lambda part: vector(
                run, lambda lane: copy(part * run + lane, start + part * run + lane)
            ),
        )

    def tile(
        self, packed: Any, outside: list[Any], top: Any, tall: int, start: Any, valid: int
    ) -> Any:
        """One tile of accumulators over the whole reduction, and its results."""
        matrices, lanes = self.matrices, self.processor.lanes
        size = int(packed.shape[1].value)
        vectors = size // lanes
        sums = local([tall, size], "sums")
        results = local([tall, size], "results")
        height = matrices.height
        exact = isinstance(height, int) and height % tall == 0

        def row_at(row: Any) -> Any:
            return top + row if exact else tirx.min(top + row, number(height) - 1)

        def each(body: Any) -> Any:
            return unrolled(
                [tall, vectors],
                lambda at: vector(lanes, lambda lane: body(at[0], at[1] * lanes + lane)),
            )

        def multiply(reduced: list[Any]) -> Any:
            place = fold(reduced, [axis.extent for axis in matrices.reduced])

            def one(row: Any, column: Any) -> Any:
                places = matrices.places(outside, row_at(row), None, reduced)
                weight = substitute(matrices.row_load, places)
                value = sums[row, column] + weight * packed[place, column]
                return tirx.BufferStore(sums, value, [row, column])

            return each(one)

        def walk() -> Any:
            extents = [axis.extent for axis in matrices.reduced]
            if static_tail(matrices.reduced) == len(extents) and (
                fused_stride(matrices.row_load, matrices.reduced) is not None
            ):
                return loop(
                    product(extents), lambda index: multiply(unfold(index, extents)), name="k"
                )
            return nest(extents, multiply, name="k")

        def store(row: Any, column: Any) -> Any:
            places = matrices.places(outside, top + row, start + column)
            axes = [places.get(axis.var, number(0)) for axis in self.stage.axes]
            return self.sink.store(axes, results[row, column])

        def guarded(row: Any, statement: Any) -> Any:
            inside = top + row < number(height)
            return statement if exact else tirx.IfThenElse(inside, statement, None)

        def finish(row: Any) -> Any:
            whole = valid // lanes
            statements = []
            if whole:
                statements.append(
                    loop(
                        whole, lambda at: vector(lanes, lambda lane: store(row, at * lanes + lane))
                    )
                )
            if valid % lanes:
                statements.append(loop(valid % lanes, lambda at: store(row, at + whole * lanes)))
            return guarded(row, sequence(statements))

        def finish_turned(column: Any) -> Any:
            if exact and tall in (4, 8):
                return vector(tall, lambda row: store(row, column))
            return loop(tall, lambda row: guarded(row, store(row, column)))

        return sequence(
            [
                allocate(sums),
                allocate(results),
                each(lambda row, at: tirx.BufferStore(sums, tirx.const(0, "float32"), [row, at])),
                walk(),
                each(lambda row, at: tirx.BufferStore(results, sums[row, at], [row, at])),
                loop(valid, finish_turned, name="column")
                if matrices.turned
                else loop(tall, finish, name="row"),
            ]
        )


def fold(indices: Sequence[Any], extents: Sequence[Any]) -> Any:
    """The one index that stands for several."""
    index: Any = number(0)
    for at, extent in zip(indices, extents, strict=True):
        index = index * extent + at
    return index
