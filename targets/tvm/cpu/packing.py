"""Pack: the columns of a panel next to each other, once, for all rows that meet them.

How a panel is copied follows from how its columns lie: side by side, in vectors; along what is
summed, as a layer's weights do, in pieces; apart, as the pixels of small or strided maps do, by a
list of where each lies.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tvm import tirx
from tvm.sym import Analyzer

from pbc.targets.tvm.cpu.loops import (
    Processor,
    allocate,
    fused_stride,
    local,
    loop,
    nest,
    number,
    product,
    sequence,
    static_size,
    static_tail,
    unfold,
    vector,
)
from pbc.targets.tvm.cpu.matrices import Matrices
from pbc.targets.tvm.cpu.stages import substitute

# Lines of memory that may share a place in the smallest caches.
WAYS = 8
# Shorter vectors than these save nothing.
SHORTEST = 4


@dataclass(frozen=True)
class Panel:
    """Columns to pack into `packed`, from `start` on; `valid` of them are there.

    outside: where the axes are that both matrices have.
    """

    matrices: Matrices
    processor: Processor
    packed: Any
    outside: Sequence[Any]
    start: Any
    valid: Any

    @property
    def size(self) -> int:
        return int(self.packed.shape[1].value)

    @property
    def is_full(self) -> bool:
        return isinstance(self.valid, int) and self.valid == self.size

    @property
    def reduced(self) -> list[Any]:
        return [axis.extent for axis in self.matrices.reduced]

    def pack(self) -> Any:
        """Copy the panel."""
        load, columns = self.matrices.column_load, self.matrices.columns
        known = static_tail(self.matrices.reduced) == len(self.reduced)
        along = known and fused_stride(load, self.matrices.reduced) == 1
        if along and fused_stride(load, columns) != 1 and product(self.reduced) % self._piece == 0:
            return self._in_pieces()
        run = self._run()
        if run < SHORTEST and (offset := self._offset()) is not None:
            return self._by_places(offset)
        return nest(
            self.reduced,
            lambda at: loop(
                self.size // run,
                lambda part: vector(run, lambda lane: self._copy(at, part * run + lane)),
            ),
            name="k",
        )

    def _copy(self, reduced: Sequence[Any], at: Any) -> Any:
        places = self.matrices.places(self.outside, None, self._column(at), reduced)
        value = substitute(self.matrices.column_load, places)
        return tirx.BufferStore(self.packed, value, [fold(reduced, self.reduced), at])

    def _column(self, at: Any) -> Any:
        """A column; instead of one that is not there, the last."""
        if self.is_full:
            return self.start + at
        return tirx.min(self.start + at, number(self.matrices.width) - 1)

    def _run(self) -> int:
        """Columns that lie side by side at once, from each multiple of that number on."""
        load, columns = self.matrices.column_load, self.matrices.columns
        run = self.processor.lanes if self.is_full else 1
        if fused_stride(load, columns) == 1:
            return run
        side_by_side = 1
        for first in range(len(columns) - 1, 0, -1):
            inner = columns[first:]
            if static_tail(inner) == len(inner) and fused_stride(load, inner) == 1:
                side_by_side = static_size(inner)
        while run > 1 and (side_by_side % run or self.size % run):
            run //= 2
        return run

    @property
    def _piece(self) -> int:
        return self.processor.lanes

    def _in_pieces(self) -> Any:
        """A piece of each column in turn.

        Point by point, each value would come from a line of its own, and all too often those lines
        share a place in the cache.
        """
        piece, group = self._piece, min(WAYS, self.processor.lanes)

        def copy(at: Any, index: Any) -> Any:
            return self._copy(unfold(index, self.reduced), at)

        return loop(
            product(self.reduced) // piece,
            lambda part: loop(
                self.size // group,
                lambda own: loop(
                    piece,
                    lambda index: loop(
                        group, lambda at: copy(own * group + at, part * piece + index)
                    ),
                ),
            ),
            name="k",
        )

    def _offset(self) -> Any:
        """The distance of each column from the first, if it is so for all that is summed."""
        load = self.matrices.column_load
        first = {axis.var: number(0) for axis in self.matrices.columns}
        origin = {axis.var: number(0) for axis in self.matrices.reduced}
        flat: Any = number(0)
        for index, extent in zip(load.indices, load.source.shape, strict=True):
            flat = flat * extent + index
        analyzer = Analyzer()
        start = substitute(flat, first)
        offset = analyzer.simplify(substitute(flat, origin) - substitute(start, origin))
        return offset if analyzer.can_prove_equal(flat, start + offset) else None

    def _by_places(self, offset: Any) -> Any:
        """Work out once, and not for each value, where each column lies."""
        places = local([self.size], "places", "int64")

        def place(at: Any) -> Any:
            found = self.matrices.places(self.outside, None, self._column(at))
            return tirx.BufferStore(places, substitute(offset, found), [at])

        def copy(reduced: list[Any], at: Any) -> Any:
            first = self.matrices.places(self.outside, None, number(0), reduced)
            load = substitute(self.matrices.column_load, first)
            moved = (*load.indices[:-1], load.indices[-1] + places[at])
            value = load.source[moved]
            return tirx.BufferStore(self.packed, value, [fold(reduced, self.reduced), at])

        pack = nest(self.reduced, lambda at: loop(self.size, lambda own: copy(at, own)), name="k")
        return sequence([allocate(places), loop(self.size, place), pack])


def fold(indices: Sequence[Any], extents: Sequence[Any]) -> Any:
    """The one index that stands for several."""
    index: Any = number(0)
    for at, extent in zip(indices, extents, strict=True):
        index = index * extent + at
    return index
