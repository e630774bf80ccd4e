"""Tensors that are made of sizes and numbers alone."""

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
    Size,
    constant,
    require,
    shape_of,
)

aten = torch.ops.aten

OPERATORS = Family()


@OPERATORS.converts(aten.scalar_tensor.default)
def _scalar_tensor(scope: Scope, value: Any, **_: Any) -> Expr:
    return scope.operand(value, scope.dtype)


@OPERATORS.converts(aten.full.default)
def _full(scope: Scope, sizes: Sequence[Size], value: Any, **_: Any) -> Expr:
    return relax.op.full(scope.contract(sizes), scope.operand(value, scope.dtype), scope.dtype)


@OPERATORS.converts(aten.full_like.default)
def _full_like(scope: Scope, x: Expr, value: Any, **_: Any) -> Expr:
    return _full(scope, shape_of(x), value)


@OPERATORS.converts(aten.zeros.default, aten.zeros_like.default, aten.new_zeros.default)
def _zeros(scope: Scope, like: Any, *sizes: Any, **_: Any) -> Expr:
    if scope.node.target == aten.zeros_like.default:
        return _full(scope, shape_of(like), 0)
    return _full(scope, sizes[0] if sizes else like, 0)


@OPERATORS.converts(aten.ones.default, aten.ones_like.default, aten.new_ones.default)
def _ones(scope: Scope, like: Any, *sizes: Any, **_: Any) -> Expr:
    if scope.node.target == aten.ones_like.default:
        return _full(scope, shape_of(like), 1)
    return _full(scope, sizes[0] if sizes else like, 1)


@OPERATORS.converts(aten.arange.default, aten.arange.start, aten.arange.start_step)
def _arange(scope: Scope, *bounds: Any, **_: Any) -> Expr:
    start, end, step = {1: (0, *bounds, 1), 2: (*bounds, 1), 3: bounds}[len(bounds)]
    if any(isinstance(bound, float) for bound in (start, end, step)):
        return constant(np.arange(start, end, step), scope.dtype)
    require(isinstance(step, int) and step > 0, "a step that is no positive number")
    count = scope.simple(tirx.floordiv(end - start + step - 1, tirx.const(step, "int64")))
    dtype = scope.dtype

    def arange(count: Size, start: Size) -> Any:
        return te.compute((count,), lambda index: (index * step + start).astype(dtype))

    return (
        scope.compute(lambda count: arange(count, start), tirx.IntImm("int64", count))
        if isinstance(count, int)
        else scope.compute(lambda count: arange(count, start), count)
    )


@OPERATORS.converts(aten.copy.default, aten.fill.Tensor)
def _copy(scope: Scope, x: Expr, source: Expr, *_: Any) -> Expr:
    return relax.op.broadcast_to(scope.cast(source, scope.dtype), shape_of(x))
