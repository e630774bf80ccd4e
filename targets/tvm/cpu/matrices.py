"""Sums of products read as matrices: which axes are rows, columns, and what is summed.

Of the two tensors one does not depend on the last axes of the result: its own axes are the *rows*.
The other's are the *columns*: a convolution has output channels as rows and pixels as columns.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from pbc.targets.tvm.cpu.loops import (
    Processor,
    fused_stride,
    least_size,
    product,
    static_size,
    static_tail,
    unfold,
)
from pbc.targets.tvm.cpu.stages import Axis, Stage, is_product, loads, variables

# So many rows of each image make up for turning a panel of the columns.
MANY_ROWS = 32


@dataclass(frozen=True)
class Matrices:
    """The axes of a sum of products by what they index, and the two tensors."""

    outer: tuple[Axis, ...]
    rows: tuple[Axis, ...]
    columns: tuple[Axis, ...]
    reduced: tuple[Axis, ...]
    row_load: Any
    column_load: Any
    is_transposed: bool = False
    """Whether the result stores its rows, not its columns, next to each other."""
    open: tuple[Axis, ...] = ()
    """Axes of `outer` that only the columns have, and that may come before them."""

    @property
    def width(self) -> Any:
        return product([axis.extent for axis in self.columns])

    @property
    def height(self) -> Any:
        return product([axis.extent for axis in self.rows])

    def places(
        self, outside: Sequence[Any], row: Any, column: Any, reduced: Sequence[Any] | None = None
    ) -> dict[Any, Any]:
        """Each axis at a row and a column, both fused; what is None is left out."""
        found = {a.var: at for a, at in zip(self.outer, outside, strict=True)}
        for axes, index in ((self.rows, row), (self.columns, column)):
            if index is not None:
                indices = unfold(index, [axis.extent for axis in axes])
                found.update((a.var, at) for a, at in zip(axes, indices, strict=True))
        if reduced is not None:
            found.update((a.var, at) for a, at in zip(self.reduced, reduced, strict=True))
        return found


def read_matrices(stage: Stage) -> Matrices | None:
    """Read a stage as a product of matrices; None where it is none."""
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
        open=tuple(columns[: len(columns) - known]),
    )


def turn(matrices: Matrices, processor: Processor) -> Matrices:
    """Rows for columns, where the columns lie along the reduction as a layer's weights do.

    Copying a few rows is less work than turning the weights.
    """
    known = static_tail(matrices.rows)
    if least_size(matrices.rows) >= MANY_ROWS:
        return matrices
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
        is_transposed=True,
        open=matrices.rows[: len(matrices.rows) - known],
    )


def widen(stage: Stage, matrices: Matrices, processor: Processor) -> Matrices:
    """Columns of all images side by side, where those of one would leave lanes empty."""
    size, lanes = static_size(matrices.columns), processor.lanes
    if not matrices.open or size % (2 * lanes) == 0:
        return matrices
    columns = (*matrices.open, *matrices.columns)
    even = fused_stride(matrices.column_load, columns) is not None
    last = stage.axes[len(stage.axes) - len(columns) :] == columns
    if size % lanes and not (even and (matrices.is_transposed or last)):
        return matrices  # a vector would begin in one image and end in another
    outer = tuple(axis for axis in matrices.outer if axis not in matrices.open)
    return replace(matrices, outer=outer, columns=columns, open=())
