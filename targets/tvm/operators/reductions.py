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
    kind_of,
    rank_of,
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
