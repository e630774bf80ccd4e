"""Activation functions."""

from __future__ import annotations

from typing import Any

import torch
from tvm import relax, te, tirx

from pbc.targets.tvm.operators.family import Family
from pbc.targets.tvm.scope import (
    Expr,
    Scope,
    constant,
    kind_of,
)

aten = torch.ops.aten

OPERATORS = Family()


@OPERATORS.converts(
    aten.clamp.default, aten.hardtanh.default, aten.clamp_min.default, aten.clamp_max.default
)
def _clamp(scope: Scope, x: Expr, *bounds: Any, **named: Any) -> Expr:
    target = scope.node.target
    low: Any
    high: Any
    if target == aten.hardtanh.default:
        low, high = {0: (-1.0, 1.0), 1: (*bounds, 1.0), 2: bounds}[len(bounds)]
        low, high = named.get("min_val", low), named.get("max_val", high)
    elif target == aten.clamp_min.default:
        low, high = bounds[0], None
    elif target == aten.clamp_max.default:
        low, high = None, bounds[0]
    else:
        low, high = (*bounds, None, None)[:2]
        low, high = named.get("min", low), named.get("max", high)
    x = scope.cast(x, scope.dtype)
    if low is not None:
        x = scope.emit(relax.op.maximum(x, scope.operand(low, scope.dtype)))
    if high is not None:
        x = scope.emit(relax.op.minimum(x, scope.operand(high, scope.dtype)))
    return x


def _clipped(scope: Scope, x: Expr, low: float, high: float) -> Expr:
    x = scope.emit(relax.op.maximum(x, constant(low, kind_of(x))))
    return scope.emit(relax.op.minimum(x, constant(high, kind_of(x))))


@OPERATORS.converts(aten.relu6.default)
def _relu6(scope: Scope, x: Expr) -> Expr:
    return _clipped(scope, x, 0.0, 6.0)


@OPERATORS.converts(aten.hardsigmoid.default)
def _hardsigmoid(scope: Scope, x: Expr) -> Expr:
    moved = scope.emit(relax.op.add(x, constant(3.0, kind_of(x))))
    return relax.op.multiply(_clipped(scope, moved, 0.0, 6.0), constant(1 / 6, kind_of(x)))


@OPERATORS.converts(aten.hardswish.default)
def _hardswish(scope: Scope, x: Expr) -> Expr:
    return relax.op.multiply(x, scope.emit(_hardsigmoid(scope, x)))


@OPERATORS.converts(aten.leaky_relu.default)
def _leaky_relu(scope: Scope, x: Expr, slope: float = 0.01) -> Expr:
    return relax.op.nn.leakyrelu(x, slope)


@OPERATORS.converts(aten.elu.default)
def _elu(scope: Scope, x: Expr, alpha: float = 1.0, scale: float = 1.0, inner: float = 1.0) -> Expr:
    def elu(x: Any) -> Any:
        def value(*index: Any) -> Any:
            negative = alpha * scale * (tirx.exp(x(*index) * inner) - 1.0)
            return tirx.Select(x(*index) > 0.0, x(*index) * scale, negative)

        return te.compute(x.shape, value)

    return scope.compute(elu, x)


@OPERATORS.converts(aten.gelu.default)
def _gelu(scope: Scope, x: Expr, approximate: str = "none") -> Expr:
    return relax.op.nn.gelu_tanh(x) if approximate == "tanh" else relax.op.nn.gelu(x)


@OPERATORS.converts(aten.softplus.default)
def _softplus(scope: Scope, x: Expr, beta: float = 1.0, threshold: float = 20.0) -> Expr:
    def softplus(x: Any) -> Any:
        def value(*index: Any) -> Any:
            scaled = x(*index) * beta
            soft = tirx.log(1.0 + tirx.exp(tirx.min(scaled, tirx.const(threshold, x.dtype))))
            return tirx.Select(scaled > threshold, x(*index), soft / beta)

        return te.compute(x.shape, value)

    return scope.compute(softplus, x)


@OPERATORS.converts(aten.clamp.Tensor)
def _clamp_by_tensors(
    scope: Scope, x: Expr, low: Expr | None = None, high: Expr | None = None
) -> Expr:
    x = scope.cast(x, scope.dtype)
    if low is not None:
        x = scope.emit(relax.op.maximum(x, scope.cast(low, scope.dtype)))
    return x if high is None else relax.op.minimum(x, scope.cast(high, scope.dtype))
