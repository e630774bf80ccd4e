"""Reads and additions at places that a tensor of indices names."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from tvm import relax, te, tirx

from pbc.targets.tvm.operators.family import Family
from pbc.targets.tvm.scope import (
    Expr,
    Scope,
    Size,
    kind_of,
    rank_of,
    require,
    shape_of,
)

aten = torch.ops.aten

OPERATORS = Family()


@OPERATORS.converts(aten.index_select.default)
def _index_select(scope: Scope, x: Expr, axis: int, index: Expr) -> Expr:
    return relax.op.take(x, index, axis % rank_of(x), "clip")


@OPERATORS.converts(aten.embedding.default)
def _embedding(scope: Scope, weight: Expr, indices: Expr, *_: Any) -> Expr:
    return relax.op.take(weight, indices, 0, "clip")


@OPERATORS.converts(aten.index.Tensor, aten._unsafe_index.Tensor)
def _index(scope: Scope, x: Expr, indices: Sequence[Any]) -> Expr:
    """One or several tensors of indices, which are read together and may count from the end."""
    axes = _indexed(indices)
    given = [indices[axis] for axis in axes]
    shape = _joint_shape(scope, given)
    front = _front(axes)

    def index(x: Any, *given: Any) -> Any:
        rest = [size for axis, size in enumerate(x.shape) if axis not in axes]

        def value(*at: Any) -> Any:
            place, others = at[front : front + len(shape)], [*at[:front], *at[front + len(shape) :]]
            own = dict(zip(axes, (_read(index, place) for index in given), strict=True))
            left = iter(others)
            reads = [
                _from_end(own[axis], size) if axis in own else next(left)
                for axis, size in enumerate(x.shape)
            ]
            return x(*reads)

        return te.compute([*rest[:front], *shape, *rest[front:]], value)

    return scope.compute(index, x, *given)


def _indexed(indices: Sequence[Any]) -> list[int]:
    """The axes that have indices."""
    axes = [axis for axis, index in enumerate(indices) if index is not None]
    require(all(kind_of(indices[axis]) != "bool" for axis in axes), "a mask")
    return axes


def _front(axes: Sequence[int]) -> int:
    """The axis of the result where those of the indices begin: torch puts them first if apart."""
    return axes[0] if list(axes) == list(range(axes[0], axes[-1] + 1)) else 0


def _joint_shape(scope: Scope, given: Sequence[Expr]) -> list[Size]:
    """The shape that indices have together, each broadcast to it."""
    rank = max(rank_of(index) for index in given)
    shape: list[Size] = [1] * rank
    for index in given:
        for axis, size in enumerate(shape_of(index), rank - rank_of(index)):
            if not scope.equal(size, 1):
                shape[axis] = size
    return shape


def _read(index: Any, place: Sequence[Any]) -> Any:
    """The value of a tensor of indices at a place of the joint shape."""
    own = place[len(place) - len(index.shape) :]
    return index(*(0 if _is_one(size) else at for at, size in zip(own, index.shape, strict=True)))


def _is_one(size: Any) -> bool:
    return isinstance(size, tirx.IntImm) and int(size) == 1


def _from_end(index: Any, size: Any) -> Any:
    """An index from the start; a negative one counts from the end."""
    index = index.astype("int64")
    return tirx.Select(index < 0, index + size, index)


@OPERATORS.converts(aten.index_put.default, aten._unsafe_index_put.default)
def _index_put(
    scope: Scope, x: Expr, indices: Sequence[Any], values: Expr, accumulate: bool = False
) -> Expr:
    """As a scatter into the indexed axes, which are moved to the front for it."""
    axes = _indexed(indices)
    given = [indices[axis] for axis in axes]
    shape = _joint_shape(scope, given)
    sizes = [shape_of(x)[axis] for axis in axes]

    def places(*given: Any) -> Any:
        def value(*at: Any) -> Any:
            read = [
                _from_end(_read(index, at[:-1]), size)
                for index, size in zip(given, sizes, strict=True)
            ]
            found = read[-1]
            for number, index in list(enumerate(read))[-2::-1]:
                found = tirx.Select(at[-1] == number, index, found)
            return found

        return te.compute([*shape, len(given)], value)

    others = [axis for axis in range(rank_of(x)) if axis not in axes]
    order = [*axes, *others]
    front = _front(axes)
    rest = [shape_of(x)[axis] for axis in others]
    goal = [*rest[:front], *shape, *rest[front:]]
    values = scope.emit(relax.op.broadcast_to(scope.cast(values, kind_of(x)), goal))
    own = [*range(front, front + len(shape))]
    values = _permuted(scope, values, [*own, *(a for a in range(len(goal)) if a not in own)])
    placed = scope.emit(
        relax.op.scatter_nd(
            _permuted(scope, x, order),
            scope.compute(places, *given),
            values,
            "add" if accumulate else "update",
        )
    )
    return _permuted(scope, placed, [order.index(axis) for axis in range(rank_of(x))])


def _permuted(scope: Scope, x: Expr, order: Sequence[int]) -> Expr:
    return x if list(order) == sorted(order) else scope.emit(relax.op.permute_dims(x, list(order)))


@OPERATORS.converts(aten.gather.default)
def _gather(scope: Scope, x: Expr, axis: int, index: Expr) -> Expr:
    axis %= rank_of(x)

    def gather(x: Any, index: Any) -> Any:
        return te.compute(index.shape, lambda *at: x(*at[:axis], index(*at), *at[axis + 1 :]))

    return scope.compute(gather, x, index)


@OPERATORS.converts(aten.scatter_add.default)
def _scatter_add(scope: Scope, x: Expr, axis: int, index: Expr, source: Expr) -> Expr:
    sizes = zip(shape_of(index), shape_of(source), strict=True)
    require(all(scope.equal(one, other) for one, other in sizes), "a source larger than its index")
    return relax.op.scatter_elements(x, index, source, axis % rank_of(x), "add")
