"""Pooling: one value for each window of a feature map."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from tvm import relax, te, tirx

from pbc.targets.tvm.operators.family import Family
from pbc.targets.tvm.scope import (
    Expr,
    Scope,
    pair,
    rank_of,
    require,
)

aten = torch.ops.aten

OPERATORS = Family()


@OPERATORS.converts(aten.max_pool2d.default, aten.max_pool2d_with_indices.default)
def _max_pool2d(
    scope: Scope,
    x: Expr,
    kernel: Any,
    stride: Any = (),
    padding: Any = 0,
    dilation: Any = 1,
    ceil_mode: bool = False,
) -> Any:
    pooled = relax.op.nn.max_pool2d(
        x,
        pair(kernel),
        pair(stride or kernel),
        pair(padding),
        pair(dilation),
        ceil_mode,
    )
    if scope.node.target == aten.max_pool2d.default:
        return pooled
    values = scope.emit(pooled)
    if not any(user.args[1:] == (1,) for user in scope.node.users):
        return [values, None]
    window = zip(pair(kernel), pair(stride or kernel), pair(padding), pair(dilation), strict=True)
    return [values, scope.compute(_first_places, x, values, list(window))]


def _first_places(x: Any, pooled: Any, window: Sequence[tuple[int, int, int, int]]) -> Any:
    """Where in its plane each window first has its largest value, as torch counts.

    window: size, stride, padding and dilation of rows, and of columns.
    """
    height, width = x.shape[2:]
    steps = [te.reduce_axis((0, size)) for size, *_ in window]

    def value(image: Any, channel: Any, *at: Any) -> Any:
        row, column = (
            place * stride - padding + step * dilation
            for place, step, (_, stride, padding, dilation) in zip(at, steps, window, strict=True)
        )
        inside = tirx.all(row >= 0, row < height, column >= 0, column < width)
        # Nowhere equal are values that are no numbers: the last place is a place at least.
        last = (height * width - 1).astype("int64")
        largest = x(image, channel, row, column) == pooled(image, channel, *at)
        found = tirx.Select(largest, (row * width + column).astype("int64"), last)
        return te.min(tirx.if_then_else(inside, found, last), steps)

    return te.compute(pooled.shape, value)


@OPERATORS.converts(aten.avg_pool2d.default)
def _avg_pool2d(
    scope: Scope,
    x: Expr,
    kernel: Any,
    stride: Any = (),
    padding: Any = 0,
    ceil_mode: bool = False,
    count_include_pad: bool = True,
    divisor: int | None = None,
) -> Expr:
    require(divisor is None, "a divisor of its own")
    require(not ceil_mode or not any(pair(padding)), "ceil_mode and padding")
    return relax.op.nn.avg_pool2d(
        x,
        pair(kernel),
        pair(stride or kernel),
        pair(padding),
        (1, 1),
        ceil_mode,
        count_include_pad,
    )


@OPERATORS.converts(aten.adaptive_avg_pool2d.default, aten._adaptive_avg_pool2d.default)
def _adaptive_avg_pool2d(scope: Scope, x: Expr, size: Any) -> Expr:
    goal = pair(size)
    if goal == (1, 1):
        return relax.op.mean(x, [rank_of(x) - 2, rank_of(x) - 1], True)
    return relax.op.nn.adaptive_avg_pool2d(x, goal)
