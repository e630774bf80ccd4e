"""Parts of tensors, and tensors of parts: slicing, splitting, joining, overwriting."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from tvm import relax, te, tirx

from pbc.targets.tvm.operators.family import Family
from pbc.targets.tvm.scope import (
    Expr,
    Scope,
    Unsupported,
    axes_of,
    rank_of,
    require,
    shape_of,
)

aten = torch.ops.aten

OPERATORS = Family()

_END = 2**63 - 1


@OPERATORS.converts(aten.slice.Tensor)
def _slice(
    scope: Scope, x: Expr, axis: int = 0, start: Any = None, end: Any = None, step: int = 1
) -> Expr:
    axis %= rank_of(x)
    size = shape_of(x)[axis]
    start, end = 0 if start is None else start, _END if end is None else end
    if isinstance(size, int):
        if not (isinstance(start, int) and isinstance(end, int)):
            raise Unsupported("bounds that depend on the batch")
        start, end, step = slice(start, end, step).indices(size)
        if (start, end, step) == (0, size, 1):
            return x
    elif isinstance(end, int) and end >= _END and isinstance(start, int) and start >= 0:
        if start == 0 and step == 1:
            return x
        end = size
    elif not isinstance(start, int):
        raise Unsupported("a start that depends on the batch")
    elif start < 0 or (isinstance(end, int) and end < 0):
        raise Unsupported("negative bounds along the batch")
    return relax.op.strided_slice(x, [axis], [start], [end], [step], assume_inbound=True)


@OPERATORS.converts(aten.select.int)
def _select(scope: Scope, x: Expr, axis: int, index: int) -> Expr:
    axis %= rank_of(x)
    size = shape_of(x)[axis]
    require(isinstance(index, int) and (isinstance(size, int) or index >= 0), "such an index")
    index = index % size if isinstance(size, int) else index
    return _selected(scope, x, axis, index)


def _selected(scope: Scope, x: Expr, axis: int, index: int) -> Expr:
    def select(x: Any) -> Any:
        shape = [*x.shape[:axis], *x.shape[axis + 1 :]]
        return te.compute(shape, lambda *at: x(*at[:axis], index, *at[axis:]))

    return scope.compute(select, x)


@OPERATORS.converts(aten.unbind.int)
def _unbind(scope: Scope, x: Expr, axis: int = 0) -> list[Expr]:
    axis %= rank_of(x)
    return [_selected(scope, x, axis, index) for index in range(shape_of(x)[axis])]


def _parts(scope: Scope, x: Expr, axis: int, lengths: Sequence[int]) -> list[Expr]:
    ends = np.cumsum(lengths).tolist()
    return [
        scope.emit(relax.op.strided_slice(x, [axis], [end - length], [end], assume_inbound=True))
        for length, end in zip(lengths, ends, strict=True)
    ]


@OPERATORS.converts(aten.split.Tensor, aten.split_with_sizes.default, aten.chunk.default)
def _split(scope: Scope, x: Expr, how: Any, axis: int = 0) -> list[Expr]:
    axis %= rank_of(x)
    size = shape_of(x)[axis]
    require(isinstance(size, int), "the batch as its axis")
    if scope.node.target == aten.split_with_sizes.default:
        return _parts(scope, x, axis, how)
    length = how if scope.node.target == aten.split.Tensor else -(-size // how)
    return _parts(scope, x, axis, [min(length, size - at) for at in range(0, size, length)])


@OPERATORS.converts(aten.cat.default)
def _cat(scope: Scope, tensors: Sequence[Expr], axis: int = 0) -> Expr:
    some = [scope.cast(x, scope.dtype) for x in tensors]
    return relax.op.concat(some, axis % rank_of(some[0]))


@OPERATORS.converts(aten.stack.default)
def _stack(scope: Scope, tensors: Sequence[Expr], axis: int = 0) -> Expr:
    axis %= rank_of(tensors[0]) + 1
    return relax.op.concat([scope.emit(relax.op.expand_dims(x, axis)) for x in tensors], axis)


@OPERATORS.converts(aten.flip.default)
def _flip(scope: Scope, x: Expr, axes: Sequence[int]) -> Expr:
    flipped = set(axes_of(x, list(axes))) if axes else set()

    def flip(x: Any) -> Any:
        def value(*index: Any) -> Any:
            return x(*[x.shape[a] - 1 - i if a in flipped else i for a, i in enumerate(index)])

        return te.compute(x.shape, value)

    return scope.compute(flip, x)


@OPERATORS.converts(aten.roll.default)
def _roll(scope: Scope, x: Expr, shifts: Sequence[int], axes: Sequence[int] = ()) -> Expr:
    require(len(axes) == len(shifts), "no axes")
    for shift, axis in zip(shifts, axes_of(x, list(axes)), strict=True):
        size = shape_of(x)[axis]
        require(isinstance(size, int), "the batch as its axis")
        if shift % size:
            at = size - shift % size
            first, second = _parts(scope, x, axis, [at, size - at])
            x = scope.emit(relax.op.concat([second, first], axis))
    return x


@OPERATORS.converts(aten.slice_scatter.default)
def _slice_scatter(
    scope: Scope,
    x: Expr,
    source: Expr,
    axis: int = 0,
    start: Any = None,
    end: Any = None,
    step: int = 1,
) -> Expr:
    axis %= rank_of(x)
    size = shape_of(x)[axis]
    start, end = 0 if start is None else start, _END if end is None else end
    if not isinstance(size, int):
        require((start, end, step) == (0, _END, 1), "part of the batch")
        return source
    start, end, step = slice(start, end, step).indices(size)
    if (start, end, step) == (0, size, 1):
        return source

    def scatter(x: Any, source: Any) -> Any:
        def value(*index: Any) -> Any:
            at = index[axis]
            inside = tirx.all(at >= start, at < end, tirx.floormod(at - start, step) == 0)
            place = tirx.floordiv(at - start, step)
            read = source(*index[:axis], place, *index[axis + 1 :])
            return tirx.if_then_else(inside, read, x(*index))

        return te.compute(x.shape, value)

    return scope.compute(scatter, x, source)


@OPERATORS.converts(aten.select_scatter.default)
def _select_scatter(scope: Scope, x: Expr, source: Expr, axis: int, index: int) -> Expr:
    axis %= rank_of(x)
    size = shape_of(x)[axis]
    require(isinstance(size, int), "the batch as its axis")
    index %= size

    def scatter(x: Any, source: Any) -> Any:
        def value(*at: Any) -> Any:
            read = source(*at[:axis], *at[axis + 1 :])
            return tirx.if_then_else(at[axis] == index, read, x(*at))

        return te.compute(x.shape, value)

    return scope.compute(scatter, x, source)


@OPERATORS.converts(aten.unfold.default)
def _unfold(scope: Scope, x: Expr, axis: int, size: int, step: int) -> Expr:
    """Windows along an axis, their positions as a last axis."""
    axis %= rank_of(x)

    def unfold(x: Any) -> Any:
        count = tirx.floordiv(x.shape[axis] - size, step) + 1
        shape = [*x.shape[:axis], count, *x.shape[axis + 1 :], size]
        return te.compute(
            shape, lambda *at: x(*at[:axis], at[axis] * step + at[-1], *at[axis + 1 : -1])
        )

    return scope.compute(unfold, x)
