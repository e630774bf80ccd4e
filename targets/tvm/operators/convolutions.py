"""Convolutions and transposed convolutions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from tvm import relax, te, tirx, topi

from pbc.targets.tvm.operators.family import Family
from pbc.targets.tvm.scope import (
    Expr,
    Scope,
    pair,
    rank_of,
    require,
    shape_of,
)

aten = torch.ops.aten

OPERATORS = Family()


@OPERATORS.converts(aten.conv2d.default)
def _conv2d(
    scope: Scope,
    x: Expr,
    weight: Expr,
    bias: Expr | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> Expr:
    return _convolution(scope, x, weight, bias, stride, padding, dilation, False, 0, groups)


@OPERATORS.converts(aten.convolution.default)
def _convolution(
    scope: Scope,
    x: Expr,
    weight: Expr,
    bias: Expr | None,
    stride: Any,
    padding: Any,
    dilation: Any,
    transposed: bool,
    output_padding: Any,
    groups: int,
) -> Expr:
    if rank_of(x) == 3:
        return _over_one_axis(
            scope, x, weight, bias, stride, padding, dilation, transposed, output_padding, groups
        )
    if rank_of(x) == 5:
        require(not transposed, "a transposed convolution over 3 axes")
        pads = [*_triple(padding), *_triple(padding)]
        volume = relax.op.nn.conv3d(
            x,
            weight,
            strides=_triple(stride),
            padding=pads,
            dilation=_triple(dilation),
            groups=groups,
        )
        return _biased(scope, scope.emit(volume), bias)
    stride, padding, dilation = pair(stride), pair(padding), pair(dilation)
    pads = [*padding, *padding]
    if transposed:
        x, weight, pads = _as_convolution(
            scope, x, weight, stride, padding, dilation, pair(output_padding), groups
        )
        stride = (1, 1)
    result = scope.emit(
        relax.op.nn.conv2d(
            x, weight, strides=stride, padding=pads, dilation=dilation, groups=groups
        )
    )
    return _biased(scope, result, bias)


def _biased(scope: Scope, x: Expr, bias: Expr | None) -> Expr:
    if bias is None:
        return x
    return relax.op.add(x, scope.reshape(bias, [1, -1, *[1] * (rank_of(x) - 2)]))


def _triple(value: Any) -> tuple[int, int, int]:
    first, second, third = value if len(value) == 3 else [value[0]] * 3
    return int(first), int(second), int(third)


def _over_one_axis(
    scope: Scope,
    x: Expr,
    weight: Expr,
    bias: Expr | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    transposed: bool,
    output_padding: Sequence[int],
    groups: int,
) -> Expr:
    """As one over feature maps of a single row."""
    x, weight = (scope.emit(relax.op.expand_dims(value, 2)) for value in (x, weight))
    window = ([1, *stride], [0, *padding], [1, *dilation], transposed, [0, *output_padding])
    rows = scope.emit(_convolution(scope, x, weight, bias, *window, groups))
    return scope.reshape(rows, [size for axis, size in enumerate(shape_of(rows)) if axis != 2])


def _as_convolution(
    scope: Scope,
    x: Expr,
    weight: Expr,
    stride: tuple[int, int],
    padding: tuple[int, int],
    dilation: tuple[int, int],
    output_padding: tuple[int, int],
    groups: int,
) -> tuple[Expr, Expr, list[int]]:
    """Input, weight and padding on four sides of the convolution that a transposed one is.

    The input's values are moved apart by the stride, the kernel is flipped (Dumoulin and
    Visin, A guide to convolution arithmetic, 2016).
    """
    inputs, outputs, *kernel = shape_of(weight)
    reach = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
    before = [r - p for r, p in zip(reach, padding, strict=True)]
    after = [b + o for b, o in zip(before, output_padding, strict=True)]
    require(min(*before, *after) >= 0, "a padding beyond its kernel")
    if stride != (1, 1):
        x = scope.compute(lambda x: topi.nn.dilate(x, [1, 1, *stride]), x)

    def flip(weight: Any) -> Any:
        own = inputs // groups

        def value(out: Any, into: Any, row: Any, column: Any) -> Any:
            group, channel = tirx.floordiv(out, outputs), tirx.floormod(out, outputs)
            return weight(group * own + into, channel, kernel[0] - 1 - row, kernel[1] - 1 - column)

        return te.compute((outputs * groups, own, *kernel), value)

    return x, scope.compute(flip, weight), [*before, *after]
