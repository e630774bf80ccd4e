"""Sizes of tensors, and Python's arithmetic with them."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import torch
from tvm import tirx

from pbc.targets.tvm.operators.family import Family
from pbc.targets.tvm.scope import (
    Expr,
    Scope,
    Size,
    Unsupported,
    count_of,
    shape_of,
)

aten = torch.ops.aten

OPERATORS = Family()


@OPERATORS.converts(aten.sym_size.int)
def _sym_size(scope: Scope, x: Expr, axis: int) -> Size:
    return shape_of(x)[axis]


@OPERATORS.converts(aten.sym_numel.default)
def _sym_numel(scope: Scope, x: Expr) -> Size:
    return scope.simple(count_of(x))


@OPERATORS.converts(operator.mul, operator.add, operator.sub)
def _size_arithmetic(scope: Scope, one: Size, other: Size) -> Size:
    assert callable(scope.node.target)
    return scope.simple(scope.node.target(one, other))


@OPERATORS.converts(operator.floordiv)
def _size_floordiv(scope: Scope, one: Size, other: Size) -> Size:
    if isinstance(one, int) and isinstance(other, int):
        return one // other
    return scope.simple(tirx.floordiv(one, other))


@OPERATORS.converts(operator.getitem)
def _getitem(scope: Scope, values: Sequence[Any], index: int) -> Any:
    if values[index] is None:
        raise Unsupported(f"its output {index} in use")
    return values[index]
