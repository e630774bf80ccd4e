"""Sums, means, extremes and variances along axes."""

from __future__ import annotations

import math
from typing import Any

import torch
from tvm import relax, te, tirx

from pbc.targets.tvm.operators.family import Family
from pbc.targets.tvm.scope import (
    Expr,
    Scope,
    axes_of,
    constant,
    kind_of,
    rank_of,
    require,
    shape_of,
    zero,
)

aten = torch.ops.aten

OPERATORS = Family()


@OPERATORS.converts(aten.sum.default, aten.sum.dim_IntList)
def _sum(scope: Scope, x: Expr, axes: Any = None, keep: bool = False, **_: Any) -> Expr:
    x = scope.cast(x, scope.dtype)
    return relax.op.sum(x, axes_of(x, axes), keep) if rank_of(x) else x


@OPERATORS.converts(aten.mean.default, aten.mean.dim)
def _mean(scope: Scope, x: Expr, axes: Any = None, keep: bool = False, **_: Any) -> Expr:
    return relax.op.mean(x, axes_of(x, axes), keep) if rank_of(x) else x


@OPERATORS.converts(aten.amax.default)
def _amax(scope: Scope, x: Expr, axes: Any = None, keep: bool = False) -> Expr:
    return relax.op.max(x, axes_of(x, axes), keep)


@OPERATORS.converts(aten.amin.default)
def _amin(scope: Scope, x: Expr, axes: Any = None, keep: bool = False) -> Expr:
    return relax.op.min(x, axes_of(x, axes), keep)


@OPERATORS.converts(aten.cumsum.default)
def _cumsum(scope: Scope, x: Expr, axis: int, **_: Any) -> Expr:
    """As a sum under a triangle: what is summed so is short, and a scan has no schedule."""
    axis %= rank_of(x)
    x = scope.cast(x, scope.dtype)

    def cumulate(x: Any) -> Any:
        other = te.reduce_axis((0, x.shape[axis]))

        def value(*at: Any) -> Any:
            read = x(*at[:axis], other, *at[axis + 1 :])
            return te.sum(tirx.if_then_else(other <= at[axis], read, zero(x)), other)

        return te.compute(x.shape, value)

    return scope.compute(cumulate, x)


def _zero(x: Any) -> Any:
    return tirx.const(0, x.dtype)


@OPERATORS.converts(aten.var.correction, aten.var_mean.correction)
def _var(
    scope: Scope, x: Expr, axes: Any = None, *, correction: Any = 1, keepdim: bool = False
) -> Any:
    chosen = axes_of(x, axes)
    count = math.prod(shape_of(x)[axis] for axis in chosen)
    mean = scope.emit(relax.op.mean(x, chosen, True))
    centred = scope.emit(relax.op.subtract(x, mean))
    squares = scope.emit(
        relax.op.sum(scope.emit(relax.op.multiply(centred, centred)), chosen, True)
    )
    divisor = scope.operand(count - (1 if correction is None else correction), kind_of(x))
    results = [scope.emit(relax.op.divide(squares, divisor)), mean]
    if not keepdim:
        shape = [size for axis, size in enumerate(shape_of(x)) if axis not in chosen]
        results = [scope.reshape(result, shape) for result in results]
    return results if scope.node.target == aten.var_mean.correction else results[0]


@OPERATORS.converts(aten.prod.default, aten.prod.dim_int)
def _prod(scope: Scope, x: Expr, axis: int | None = None, keep: bool = False, **_: Any) -> Expr:
    return relax.op.prod(scope.cast(x, scope.dtype), axes_of(x, axis), keep)


@OPERATORS.converts(aten.any.default, aten.any.dim, aten.any.dims)
def _any(scope: Scope, x: Expr, axes: Any = None, keep: bool = False) -> Expr:
    """As the largest of 0 and 1: loops over truth values have no schedule."""
    true = x if kind_of(x) == "bool" else relax.op.not_equal(x, constant(0, kind_of(x)))
    values = scope.cast(scope.emit(true), "float32")
    found = scope.emit(relax.op.max(values, axes_of(x, axes), keep))
    return relax.op.greater(found, constant(0, "float32"))


@OPERATORS.converts(aten.argmax.default, aten.argmin.default)
def _argmax(scope: Scope, x: Expr, axis: int | None = None, keep: bool = False) -> Expr:
    if axis is None:
        require(not keep, "keepdim of all axes")
        x, axis = scope.reshape(x, [-1]), 0
    smallest = scope.node.target == aten.argmin.default
    return _place(scope, x, axis % rank_of(x), keep, smallest)


@OPERATORS.converts(aten.max.dim, aten.min.dim)
def _extreme(scope: Scope, x: Expr, axis: int, keep: bool = False) -> list[Any]:
    axis %= rank_of(x)
    smallest = scope.node.target == aten.min.dim
    values = (relax.op.min if smallest else relax.op.max)(x, [axis], keep)
    read = any(user.args[1:] == (1,) for user in scope.node.users)
    return [scope.emit(values), _place(scope, x, axis, keep, smallest) if read else None]


def _place(scope: Scope, x: Expr, axis: int, keep: bool, smallest: bool) -> Expr:
    """The first index of the largest value along an axis, or of the smallest, int64.

    As two reductions: TVM's own is one over pairs, which no schedule of ours reads.
    """
    best = scope.emit((relax.op.min if smallest else relax.op.max)(x, [axis], True))

    def first(x: Any, best: Any) -> Any:
        other = te.reduce_axis((0, x.shape[axis]))
        last = (x.shape[axis] - 1).astype("int64")

        def value(*at: Any) -> Any:
            around = list(at) if keep else [*at[:axis], 0, *at[axis:]]
            read, goal = ([*around[:axis], place, *around[axis + 1 :]] for place in (other, 0))
            found = x(*read) == best(*goal)
            # No value equals one that is no number: the last place is a place at least.
            return te.min(tirx.Select(found, other.var.astype("int64"), last), other)

        middle = [1] if keep else []
        return te.compute([*x.shape[:axis], *middle, *x.shape[axis + 1 :]], value)

    return scope.compute(first, x, best)


@OPERATORS.converts(aten.linalg_vector_norm.default)
def _vector_norm(
    scope: Scope, x: Expr, order: float = 2, axes: Any = None, keep: bool = False, **_: Any
) -> Expr:
    axes = axes_of(x, axes)
    sizes = scope.emit(relax.op.abs(x))
    if order in (math.inf, -math.inf):
        return (relax.op.max if order > 0 else relax.op.min)(sizes, axes, keep)
    require(order > 0, f"order {order}")
    if order == 1:
        return relax.op.sum(sizes, axes, keep)
    power = constant(order, kind_of(x))
    raised = relax.op.multiply(x, x) if order == 2 else relax.op.power(sizes, power)
    total = scope.emit(relax.op.sum(scope.emit(raised), axes, keep))
    return (
        relax.op.sqrt(total)
        if order == 2
        else relax.op.power(total, constant(1 / order, kind_of(x)))
    )
