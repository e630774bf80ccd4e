"""Products of matrices, and attention, which is made of them."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from tvm import relax

from pbc.targets.tvm.operators.family import Family
from pbc.targets.tvm.scope import (
    Expr,
    Scope,
    constant,
    kind_of,
    rank_of,
    require,
    shape_of,
)

aten = torch.ops.aten

OPERATORS = Family()


@OPERATORS.converts(aten.mm.default, aten.bmm.default, aten.matmul.default)
def _matmul(scope: Scope, one: Expr, other: Expr) -> Expr:
    return relax.op.matmul(one, other)


@OPERATORS.converts(aten.linear.default)
def _linear(scope: Scope, x: Expr, weight: Expr, bias: Expr | None = None) -> Expr:
    product = scope.emit(relax.op.matmul(x, scope.emit(relax.op.permute_dims(weight, [1, 0]))))
    return product if bias is None else relax.op.add(product, bias)


@OPERATORS.converts(aten.addmm.default, aten.baddbmm.default)
def _addmm(
    scope: Scope, bias: Expr, one: Expr, other: Expr, *, beta: Any = 1, alpha: Any = 1
) -> Expr:
    product = scope.emit(relax.op.matmul(one, other))
    if alpha != 1:
        product = scope.emit(relax.op.multiply(product, constant(alpha, scope.dtype)))
    if beta != 1:
        bias = scope.emit(relax.op.multiply(bias, constant(beta, scope.dtype)))
    return relax.op.add(product, bias)


@OPERATORS.converts(aten.scaled_dot_product_attention.default)
def _attention(
    scope: Scope,
    query: Expr,
    key: Expr,
    value: Expr,
    mask: Expr | None = None,
    dropout: float = 0.0,
    causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Expr:
    require(not (dropout or causal or enable_gqa), "dropout, is_causal or enable_gqa")
    width = shape_of(query)[-1]
    factor = constant(width**-0.5 if scale is None else scale, scope.dtype)
    last = rank_of(key) - 1
    transposed = scope.emit(relax.op.permute_dims(key, [*range(last - 1), last, last - 1]))
    scaled = scope.emit(relax.op.multiply(query, factor))
    scores = scope.emit(relax.op.matmul(scaled, transposed))
    if mask is not None and kind_of(mask) == "bool":
        lowest = scope.operand(float(np.finfo(np.float32).min), scope.dtype)
        scores = scope.emit(relax.op.where(mask, scores, lowest))
    elif mask is not None:
        scores = scope.emit(relax.op.add(scores, mask))
    return relax.op.matmul(scope.emit(relax.op.nn.softmax(scores, -1)), value)
