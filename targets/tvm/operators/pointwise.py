"""Operators that compute each value from the values at its place: arithmetic and comparisons."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from tvm import relax, te, tirx

from pbc.targets.tvm.operators.family import Family
from pbc.targets.tvm.scope import (
    Converter,
    Expr,
    Scope,
    constant,
    dtype_name,
    is_tensor,
    kind_of,
    require,
)

aten = torch.ops.aten

OPERATORS = Family()


def _unary(operators: Mapping[Any, Callable[..., Expr]]) -> None:
    def converter(function: Callable[..., Expr]) -> Converter:
        def convert_unary(scope: Scope, x: Expr) -> Expr:
            return function(scope.cast(x, scope.dtype))

        return convert_unary

    for target, function in operators.items():
        OPERATORS.enter(target, converter(function))


_unary(
    {
        aten.abs.default: relax.op.abs,
        aten.acos.default: relax.op.acos,
        aten.acosh.default: relax.op.acosh,
        aten.asin.default: relax.op.asin,
        aten.asinh.default: relax.op.asinh,
        aten.atan.default: relax.op.atan,
        aten.atanh.default: relax.op.atanh,
        aten.ceil.default: relax.op.ceil,
        aten.cos.default: relax.op.cos,
        aten.cosh.default: relax.op.cosh,
        aten.erf.default: relax.op.erf,
        aten.exp.default: relax.op.exp,
        aten.floor.default: relax.op.floor,
        aten.log.default: relax.op.log,
        aten.neg.default: relax.op.negative,
        aten.relu.default: relax.op.nn.relu,
        aten.round.default: relax.op.round,
        aten.rsqrt.default: relax.op.rsqrt,
        aten.sigmoid.default: relax.op.sigmoid,
        aten.silu.default: relax.op.nn.silu,
        aten.sign.default: relax.op.sign,
        aten.sin.default: relax.op.sin,
        aten.sinh.default: relax.op.sinh,
        aten.sqrt.default: relax.op.sqrt,
        aten.square.default: relax.op.square,
        aten.tan.default: relax.op.tan,
        aten.tanh.default: relax.op.tanh,
        aten.trunc.default: relax.op.trunc,
    }
)


@OPERATORS.converts(
    aten.alias.default,
    aten.clone.default,
    aten.contiguous.default,
    aten.detach.default,
    aten.lift_fresh_copy.default,
)
def _same(scope: Scope, x: Expr, **_: Any) -> Expr:
    return x


@OPERATORS.converts(aten.dropout.default)
def _dropout(scope: Scope, x: Expr, share: float, train: bool) -> Expr:
    require(not train, "train=True")
    return x


@OPERATORS.converts(aten._to_copy.default, aten.to.dtype)
def _to(scope: Scope, x: Expr, *_: Any, **__: Any) -> Expr:
    return scope.cast(x, scope.dtype)


@OPERATORS.converts(aten.logical_not.default, aten.bitwise_not.default)
def _not(scope: Scope, x: Expr) -> Expr:
    require(kind_of(x) == "bool", "numbers")
    return relax.op.logical_not(x)


@OPERATORS.converts(aten.isnan.default)
def _is_nan(scope: Scope, x: Expr) -> Expr:
    return relax.op.not_equal(x, x)


@OPERATORS.converts(aten.isinf.default)
def _is_infinite(scope: Scope, x: Expr) -> Expr:
    return relax.op.equal(scope.emit(relax.op.abs(x)), constant(math.inf, kind_of(x)))


@OPERATORS.converts(aten.log2.default, aten.log10.default)
def _logarithm(scope: Scope, x: Expr) -> Expr:
    base = 2 if scope.node.target == aten.log2.default else 10
    natural = scope.emit(relax.op.log(scope.cast(x, scope.dtype)))
    return relax.op.multiply(natural, constant(1 / math.log(base), scope.dtype))


@OPERATORS.converts(aten.reciprocal.default)
def _reciprocal(scope: Scope, x: Expr) -> Expr:
    return relax.op.divide(constant(1, scope.dtype), scope.cast(x, scope.dtype))


@OPERATORS.converts(
    aten.add.Tensor, aten.add.Scalar, aten.sub.Tensor, aten.sub.Scalar, aten.rsub.Scalar
)
def _sum_of_two(scope: Scope, one: Any, other: Any, alpha: Any = 1) -> Expr:
    dtype = scope.dtype
    one, other = scope.operand(one, dtype), scope.operand(other, dtype)
    if scope.node.target == aten.rsub.Scalar:
        one, other = other, one
    if alpha != 1:
        other = scope.emit(relax.op.multiply(other, scope.operand(alpha, dtype)))
    adds = scope.node.target in (aten.add.Tensor, aten.add.Scalar)
    return (relax.op.add if adds else relax.op.subtract)(one, other)


def _binary(operators: Mapping[Any, Callable[..., Expr]]) -> None:
    def converter(function: Callable[..., Expr]) -> Converter:
        def convert_binary(scope: Scope, one: Any, other: Any) -> Expr:
            return function(scope.operand(one, scope.dtype), scope.operand(other, scope.dtype))

        return convert_binary

    for target, function in operators.items():
        OPERATORS.enter(target, converter(function))


_binary(
    {
        aten.atan2.default: relax.op.atan2,
        aten.bitwise_and.Tensor: relax.op.logical_and,
        aten.bitwise_or.Tensor: relax.op.logical_or,
        aten.bitwise_xor.Tensor: relax.op.logical_xor,
        aten.div.Scalar: relax.op.divide,
        aten.div.Tensor: relax.op.divide,
        aten.logical_and.default: relax.op.logical_and,
        aten.logical_or.default: relax.op.logical_or,
        aten.logical_xor.default: relax.op.logical_xor,
        aten.maximum.default: relax.op.maximum,
        aten.minimum.default: relax.op.minimum,
        aten.mul.Scalar: relax.op.multiply,
        aten.mul.Tensor: relax.op.multiply,
    }
)


@OPERATORS.converts(aten.pow.Tensor_Scalar, aten.pow.Tensor_Tensor)
def _pow(scope: Scope, x: Expr, exponent: Any) -> Expr:
    x = scope.cast(x, scope.dtype)
    if exponent == 2:
        return relax.op.multiply(x, x)
    if exponent == 0.5:
        return relax.op.sqrt(x)
    return relax.op.power(x, scope.operand(exponent, scope.dtype))


def _comparisons(operators: Mapping[str, Callable[..., Expr]]) -> None:
    def converter(function: Callable[..., Expr]) -> Converter:
        def compare(scope: Scope, one: Expr, other: Any) -> Expr:
            dtype = kind_of(one)
            if is_tensor(other):
                kinds = [getattr(torch, str(kind_of(value))) for value in (one, other)]
                dtype = dtype_name(torch.promote_types(*kinds))
            elif isinstance(other, float) and not str(dtype).startswith("float"):
                dtype = "float32"
            return function(scope.operand(one, dtype), scope.operand(other, dtype))

        return compare

    for name, function in operators.items():
        packet = getattr(aten, name)
        OPERATORS.converts(packet.Scalar, packet.Tensor)(converter(function))


_comparisons(
    {
        "eq": relax.op.equal,
        "ge": relax.op.greater_equal,
        "gt": relax.op.greater,
        "le": relax.op.less_equal,
        "lt": relax.op.less,
        "ne": relax.op.not_equal,
    }
)


@OPERATORS.converts(
    aten.where.self, aten.where.ScalarOther, aten.where.ScalarSelf, aten.where.Scalar
)
def _where(scope: Scope, condition: Expr, one: Any, other: Any) -> Expr:
    dtype = scope.dtype
    return relax.op.where(condition, scope.operand(one, dtype), scope.operand(other, dtype))


@OPERATORS.converts(aten.masked_fill.Scalar, aten.masked_fill.Tensor)
def _masked_fill(scope: Scope, x: Expr, mask: Expr, value: Any) -> Expr:
    return relax.op.where(mask, scope.operand(value, scope.dtype), x)


@OPERATORS.converts(aten.pow.Scalar)
def _pow_of_number(scope: Scope, base: float, exponent: Expr) -> Expr:
    return relax.op.power(constant(base, scope.dtype), scope.cast(exponent, scope.dtype))


@OPERATORS.converts(aten.log1p.default)
def _log1p(scope: Scope, x: Expr) -> Expr:
    """By a correction of log(1 + x) (Kahan; Higham, Accuracy and Stability, 2002, problem 1.5)."""

    def log1p(x: Any) -> Any:
        def value(*at: Any) -> Any:
            sum_ = x(*at) + 1.0
            near = tirx.Select(sum_ == 1.0, x(*at), tirx.log(sum_) * x(*at) / (sum_ - 1.0))
            return tirx.Select(x(*at) > 1e8, tirx.log(x(*at)), near)

        return te.compute(x.shape, value)

    return scope.compute(log1p, scope.cast(x, scope.dtype))


@OPERATORS.converts(aten.expm1.default)
def _expm1(scope: Scope, x: Expr) -> Expr:
    """By a correction of exp(x) - 1 (Kahan; Higham, Accuracy and Stability, 2002, §1.14.1)."""

    def expm1(x: Any) -> Any:
        def value(*at: Any) -> Any:
            power = tirx.exp(x(*at))
            near = (power - 1.0) * x(*at) / tirx.log(power)
            far = tirx.Select(x(*at) > 50.0, power, tirx.Select(x(*at) < -50.0, power - 1.0, near))
            return tirx.Select(power == 1.0, x(*at), far)

        return te.compute(x.shape, value)

    return scope.compute(expm1, scope.cast(x, scope.dtype))


def _quotient(scope: Scope, one: Any, other: Any, mode: str | None) -> Expr:
    """A quotient, rounded down for `floor` and towards zero for `trunc`."""
    dtype = scope.dtype
    if not dtype.startswith("float"):
        require(mode == "floor", "rounding_mode='trunc' of integers")
        return relax.op.floor_divide(scope.operand(one, dtype), scope.operand(other, dtype))
    quotient = relax.op.divide(scope.operand(one, dtype), scope.operand(other, dtype))
    if mode is None:
        return quotient
    round_ = relax.op.floor if mode == "floor" else relax.op.trunc
    return round_(scope.emit(quotient))


@OPERATORS.converts(aten.div.Tensor_mode, aten.div.Scalar_mode)
def _div_rounded(scope: Scope, one: Any, other: Any, *, rounding_mode: str | None) -> Expr:
    return _quotient(scope, one, other, rounding_mode)


@OPERATORS.converts(aten.floor_divide.default)
def _floor_divide(scope: Scope, one: Any, other: Any) -> Expr:
    return _quotient(scope, one, other, "floor")


@OPERATORS.converts(aten.fmod.Scalar, aten.fmod.Tensor)
def _fmod(scope: Scope, one: Any, other: Any) -> Expr:
    """With the sign of the dividend, as C's."""
    dtype = scope.dtype
    require(dtype.startswith("float"), "integers")
    one, other = scope.operand(one, dtype), scope.operand(other, dtype)
    whole = scope.emit(_quotient(scope, one, other, "trunc"))
    return relax.op.subtract(one, scope.emit(relax.op.multiply(whole, other)))


@OPERATORS.converts(aten.remainder.Scalar, aten.remainder.Tensor)
def _remainder(scope: Scope, one: Any, other: Any) -> Expr:
    """With the sign of the divisor, as Python's."""
    dtype = scope.dtype
    one, other = scope.operand(one, dtype), scope.operand(other, dtype)
    whole = scope.emit(_quotient(scope, one, other, "floor"))
    return relax.op.subtract(one, scope.emit(relax.op.multiply(whole, other)))
