"""The same values in another shape or order."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from tvm import relax

from pbc.targets.tvm.operators.family import Family
from pbc.targets.tvm.scope import (
    Expr,
    Scope,
    Size,
    axes_of,
    rank_of,
    shape_of,
)

aten = torch.ops.aten

OPERATORS = Family()


@OPERATORS.converts(aten.reshape.default, aten.view.default, aten._unsafe_view.default)
def _reshape(scope: Scope, x: Expr, sizes: Sequence[Size]) -> Expr:
    return scope.reshape(x, sizes)


@OPERATORS.converts(aten.flatten.using_ints)
def _flatten(scope: Scope, x: Expr, first: int = 0, last: int = -1) -> Expr:
    shape = shape_of(x)
    first, last = first % len(shape), last % len(shape)
    return scope.reshape(
        x, [*shape[:first], math.prod(shape[first : last + 1]), *shape[last + 1 :]]
    )


@OPERATORS.converts(aten.permute.default)
def _permute(scope: Scope, x: Expr, order: Sequence[int]) -> Expr:
    order = axes_of(x, list(order))
    return x if order == sorted(order) else relax.op.permute_dims(x, order)


@OPERATORS.converts(aten.transpose.int)
def _transpose(scope: Scope, x: Expr, one: int, other: int) -> Expr:
    order = list(range(rank_of(x)))
    one, other = one % len(order), other % len(order)
    order[one], order[other] = other, one
    return _permute(scope, x, order)


@OPERATORS.converts(aten.t.default)
def _t(scope: Scope, x: Expr) -> Expr:
    return x if rank_of(x) < 2 else relax.op.permute_dims(x, [1, 0])


@OPERATORS.converts(aten.unsqueeze.default)
def _unsqueeze(scope: Scope, x: Expr, axis: int) -> Expr:
    return relax.op.expand_dims(x, axis % (rank_of(x) + 1))


@OPERATORS.converts(aten.squeeze.dim, aten.squeeze.dims, aten.squeeze.default)
def _squeeze(scope: Scope, x: Expr, axes: Any = None) -> Expr:
    shape = shape_of(x)
    doomed = [
        axis for axis in axes_of(x, axes) if isinstance(shape[axis], int) and shape[axis] == 1
    ]
    return scope.reshape(x, [size for axis, size in enumerate(shape) if axis not in doomed])


@OPERATORS.converts(aten.expand.default)
def _expand(scope: Scope, x: Expr, sizes: Sequence[Size], implicit: bool = False) -> Expr:
    own = [1] * (len(sizes) - rank_of(x)) + shape_of(x)
    goal = [
        old if isinstance(size, int) and size == -1 else scope.simple(size)
        for old, size in zip(own, sizes, strict=True)
    ]
    if len(own) == rank_of(x) and all(scope.equal(o, g) for o, g in zip(own, goal, strict=True)):
        return x
    return relax.op.broadcast_to(x, goal)


@OPERATORS.converts(aten.repeat.default)
def _repeat(scope: Scope, x: Expr, repeats: Sequence[Size]) -> Expr:
    repeats = scope.contract(repeats)
    if all(isinstance(count, int) for count in repeats):
        return relax.op.tile(x, repeats)
    own = [1] * (len(repeats) - rank_of(x)) + shape_of(x)
    apart = scope.reshape(x, [part for size in own for part in (1, size)])
    pairs = [part for pair in zip(repeats, own, strict=True) for part in pair]
    wide = scope.emit(relax.op.broadcast_to(apart, pairs))
    return scope.reshape(wide, [count * size for count, size in zip(repeats, own, strict=True)])
