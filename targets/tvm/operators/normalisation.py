"""Norm layers and softmax."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from tvm import relax

from pbc.targets.tvm.operators.family import Family
from pbc.targets.tvm.scope import (
    Expr,
    Scope,
    Size,
    constant,
    kind_of,
    rank_of,
    require,
    shape_of,
)

aten = torch.ops.aten

OPERATORS = Family()


def _normalised(scope: Scope, x: Expr, axes: Sequence[int], epsilon: float) -> list[Expr]:
    """The tensor with mean zero and variance one along these axes, its mean, and 1/deviation."""
    mean = scope.emit(relax.op.mean(x, list(axes), True))
    centred = scope.emit(relax.op.subtract(x, mean))
    squares = scope.emit(relax.op.multiply(centred, centred))
    variance = scope.emit(relax.op.mean(squares, list(axes), True))
    shifted = scope.emit(relax.op.add(variance, constant(epsilon, kind_of(x))))
    inverse = scope.emit(relax.op.rsqrt(shifted))
    return [scope.emit(relax.op.multiply(centred, inverse)), mean, inverse]


def _affine(scope: Scope, x: Expr, scale: Expr | None, shift: Expr | None) -> Expr:
    if scale is not None:
        x = scope.emit(relax.op.multiply(x, scale))
    return x if shift is None else scope.emit(relax.op.add(x, shift))


@OPERATORS.converts(aten.native_layer_norm.default)
def _native_layer_norm(
    scope: Scope,
    x: Expr,
    shape: Sequence[int],
    scale: Expr | None,
    shift: Expr | None,
    epsilon: float,
) -> list[Expr]:
    axes = range(rank_of(x) - len(shape), rank_of(x))
    normal, mean, inverse = _normalised(scope, x, axes, epsilon)
    return [_affine(scope, normal, scale, shift), mean, inverse]


@OPERATORS.converts(aten.layer_norm.default)
def _layer_norm(
    scope: Scope,
    x: Expr,
    shape: Sequence[int],
    scale: Expr | None = None,
    shift: Expr | None = None,
    epsilon: float = 1e-5,
    *_: Any,
) -> Expr:
    return _native_layer_norm(scope, x, shape, scale, shift, epsilon)[0]


@OPERATORS.converts(aten.native_group_norm.default)
def _native_group_norm(
    scope: Scope,
    x: Expr,
    scale: Expr | None,
    shift: Expr | None,
    batch: Size,
    channels: int,
    area: Size,
    groups: int,
    epsilon: float,
) -> list[Expr]:
    shape = shape_of(x)
    apart = scope.reshape(x, [shape[0], groups, channels // groups * math.prod(shape[2:])])
    normal, mean, inverse = _normalised(scope, apart, [2], epsilon)
    along = [1, channels, *(1 for _ in shape[2:])]
    scale, shift = (
        None if value is None else scope.reshape(value, along) for value in (scale, shift)
    )
    statistics = (scope.reshape(value, [shape[0], groups]) for value in (mean, inverse))
    return [_affine(scope, scope.reshape(normal, shape), scale, shift), *statistics]


@OPERATORS.converts(aten._native_batch_norm_legit.no_stats)
def _batch_norm_by_own_statistics(
    scope: Scope,
    x: Expr,
    scale: Expr | None,
    shift: Expr | None,
    _training: bool,
    _momentum: float,
    epsilon: float,
) -> list[Expr]:
    """Norm each channel over all images; networks write the standardisation of weights so."""
    channels, *rest = shape_of(x)[1:]
    normal, mean, inverse = _normalised(scope, x, [0, *range(2, rank_of(x))], epsilon)
    along = [1, channels, *(1 for _ in rest)]
    scale, shift = (
        None if value is None else scope.reshape(value, along) for value in (scale, shift)
    )
    statistics = (scope.reshape(value, [channels]) for value in (mean, inverse))
    return [_affine(scope, normal, scale, shift), *statistics]


@OPERATORS.converts(aten.group_norm.default)
def _group_norm(
    scope: Scope,
    x: Expr,
    groups: int,
    scale: Expr | None = None,
    shift: Expr | None = None,
    epsilon: float = 1e-5,
    *_: Any,
) -> Expr:
    channels = shape_of(x)[1]
    return _native_group_norm(scope, x, scale, shift, None, channels, None, groups, epsilon)[0]


@OPERATORS.converts(aten.batch_norm.default)
def _batch_norm(
    scope: Scope,
    x: Expr,
    scale: Expr | None,
    shift: Expr | None,
    mean: Expr,
    variance: Expr,
    training: bool,
    momentum: float,
    epsilon: float,
    *_: Any,
) -> Expr:
    """With the statistics that it was given; as one product and one sum per value."""
    require(not training, "training=True")
    shifted = scope.emit(relax.op.add(variance, constant(epsilon, kind_of(variance))))
    factor = scope.emit(relax.op.rsqrt(shifted))
    if scale is not None:
        factor = scope.emit(relax.op.multiply(factor, scale))
    along = [1, shape_of(mean)[0], *(1 for _ in shape_of(x)[2:])]
    moved = scope.emit(relax.op.multiply(mean, factor))
    offset = scope.emit(
        relax.op.negative(moved) if shift is None else relax.op.subtract(shift, moved)
    )
    return _affine(scope, x, scope.reshape(factor, along), scope.reshape(offset, along))


@OPERATORS.converts(aten._native_batch_norm_legit_no_training.default)
def _native_batch_norm(
    scope: Scope,
    x: Expr,
    scale: Expr | None,
    shift: Expr | None,
    mean: Expr,
    variance: Expr,
    momentum: float,
    epsilon: float,
) -> list[Any]:
    normal = _batch_norm(scope, x, scale, shift, mean, variance, False, momentum, epsilon)
    return [normal, None, None]


@OPERATORS.converts(aten.instance_norm.default)
def _instance_norm(
    scope: Scope,
    x: Expr,
    scale: Expr | None,
    shift: Expr | None,
    mean: Expr | None,
    variance: Expr | None,
    own: bool,
    momentum: float,
    epsilon: float,
    *_: Any,
) -> Expr:
    require(own and mean is None, "statistics that it was given")
    normal = _normalised(scope, x, range(2, rank_of(x)), epsilon)[0]
    along = [1, shape_of(x)[1], *(1 for _ in shape_of(x)[2:])]
    scale, shift = (v if v is None else scope.reshape(v, along) for v in (scale, shift))
    return _affine(scope, normal, scale, shift)


@OPERATORS.converts(aten.rms_norm.default)
def _rms_norm(
    scope: Scope,
    x: Expr,
    shape: Sequence[int],
    scale: Expr | None = None,
    epsilon: float | None = None,
) -> Expr:
    axes = list(range(rank_of(x) - len(shape), rank_of(x)))
    squares = scope.emit(relax.op.multiply(x, x))
    mean = scope.emit(relax.op.mean(squares, axes, True))
    least = float(np.finfo(kind_of(x)).eps) if epsilon is None else epsilon
    inverse = relax.op.rsqrt(scope.emit(relax.op.add(mean, constant(least, kind_of(x)))))
    return _affine(scope, scope.emit(relax.op.multiply(x, scope.emit(inverse))), scale, None)


@OPERATORS.converts(aten.softmax.int, aten._softmax.default)
def _softmax(scope: Scope, x: Expr, axis: int, *_: Any) -> Expr:
    return relax.op.nn.softmax(x, axis)


@OPERATORS.converts(aten.log_softmax.int, aten._log_softmax.default)
def _log_softmax(scope: Scope, x: Expr, axis: int, *_: Any) -> Expr:
    largest = scope.emit(relax.op.max(x, [axis], True))
    moved = scope.emit(relax.op.subtract(x, largest))
    total = scope.emit(relax.op.sum(scope.emit(relax.op.exp(moved)), [axis], True))
    return relax.op.subtract(moved, scope.emit(relax.op.log(total)))
