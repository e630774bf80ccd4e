"""Convolutions and transposed convolutions."""

from __future__ import annotations

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
    require(rank_of(x) == 4, f"{rank_of(x) - 2} spatial axes")
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
    if bias is None:
        return result
    return relax.op.add(result, scope.reshape(bias, [1, -1, 1, 1]))


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
    """What the convolution reads that a transposed one is: input, weight, padding on four sides.

    The input's values are moved apart by the stride, the kernel is turned around (Dumoulin and
    Visin, A guide to convolution arithmetic, 2016).
    """
    inputs, outputs, *kernel = shape_of(weight)
    reach = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
    before = [r - p for r, p in zip(reach, padding, strict=True)]
    after = [b + o for b, o in zip(before, output_padding, strict=True)]
    require(min(*before, *after) >= 0, "a padding beyond its kernel")
    if stride != (1, 1):
        x = scope.compute(lambda x: topi.nn.dilate(x, [1, 1, *stride]), x)

    def turn(weight: Any) -> Any:
        own = inputs // groups

        def value(out: Any, into: Any, row: Any, column: Any) -> Any:
            group, channel = tirx.floordiv(out, outputs), tirx.floormod(out, outputs)
            return weight(group * own + into, channel, kernel[0] - 1 - row, kernel[1] - 1 - column)

        return te.compute((outputs * groups, own, *kernel), value)

    return x, scope.compute(turn, weight), [*before, *after]
