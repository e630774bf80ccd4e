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
    zero,
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
    """Places in its plane where each window first has its largest value, as torch counts.

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
    if divisor is not None or (ceil_mode and any(pair(padding))):
        window = zip(pair(kernel), pair(stride or kernel), pair(padding), strict=True)
        sizes = [int(size) for size in scope.node.meta["val"].shape[-2:]]
        return scope.compute(_averages, x, sizes, list(window), count_include_pad, divisor)
    return relax.op.nn.avg_pool2d(
        x,
        pair(kernel),
        pair(stride or kernel),
        pair(padding),
        (1, 1),
        ceil_mode,
        count_include_pad,
    )


def _averages(
    x: Any,
    sizes: Sequence[int],
    window: Sequence[tuple[int, int, int]],
    count_include_pad: bool,
    divisor: int | None,
) -> Any:
    """Averages as torch counts them; window: size, stride and padding of rows, and of columns."""
    height, width = x.shape[-2:]
    steps = [te.reduce_axis((0, size)) for size, *_ in window]

    def total(*at: Any) -> Any:
        row, column = (
            place * stride - padding + step
            for place, step, (_, stride, padding) in zip(at[-2:], steps, window, strict=True)
        )
        inside = tirx.all(row >= 0, row < height, column >= 0, column < width)
        return te.sum(tirx.if_then_else(inside, x(*at[:-2], row, column), zero(x)), steps)

    def count(place: Any, length: Any, size: int, stride: int, padding: int) -> Any:
        margin = padding if count_include_pad else 0
        start = place * stride - padding
        return tirx.min(start + size, length + margin) - tirx.max(start, -margin)

    def average(*at: Any) -> Any:
        if divisor is not None:
            return totals(*at) / tirx.const(divisor, x.dtype)
        rows, columns = (
            count(place, length, *axis)
            for place, length, axis in zip(at[-2:], (height, width), window, strict=True)
        )
        return totals(*at) / (rows * columns).astype(x.dtype)

    shape = [*x.shape[:-2], *sizes]
    totals = te.compute(shape, total)
    return te.compute(shape, average)


@OPERATORS.converts(aten.adaptive_max_pool2d.default)
def _adaptive_max_pool2d(scope: Scope, x: Expr, size: Any) -> list[Any]:
    values = scope.compute(_bins, x, pair(size))
    if not any(user.args[1:] == (1,) for user in scope.node.users):
        return [values, None]
    return [values, scope.compute(_bins, x, pair(size), values)]


def _bins(x: Any, sizes: tuple[int, int], largest: Any = None) -> Any:
    """The largest value of each bin, or where in its plane that first is, as torch counts."""
    spans = [int(size) for size in x.shape[-2:]]
    reaches = [
        max(_bin(at, size, span)[1] - _bin(at, size, span)[0] for at in range(size))
        for size, span in zip(sizes, spans, strict=True)
    ]
    steps = [te.reduce_axis((0, reach)) for reach in reaches]

    def value(*at: Any) -> Any:
        bounds = [
            _bin(place, size, span) for place, size, span in zip(at[-2:], sizes, spans, strict=True)
        ]
        row, column = (start + step for (start, _), step in zip(bounds, steps, strict=True))
        inside = tirx.all(row < bounds[0][1], column < bounds[1][1])
        if largest is None:
            read = x(*at[:-2], row, column)
            return te.max(tirx.if_then_else(inside, read, tirx.min_value(x.dtype)), steps)
        last = tirx.const(spans[0] * spans[1] - 1, "int64")
        place = (row * spans[1] + column).astype("int64")
        found = tirx.Select(x(*at[:-2], row, column) == largest(*at), place, last)
        return te.min(tirx.if_then_else(inside, found, last), steps)

    return te.compute([*x.shape[:-2], *sizes], value)


def _bin(place: Any, size: int, span: int) -> tuple[Any, Any]:
    """The start of a bin of an adaptive pooling, and its end."""
    return place * span // size, -(-(place + 1) * span // size)


@OPERATORS.converts(aten.adaptive_avg_pool2d.default, aten._adaptive_avg_pool2d.default)
def _adaptive_avg_pool2d(scope: Scope, x: Expr, size: Any) -> Expr:
    goal = pair(size)
    if goal == (1, 1):
        return relax.op.mean(x, [rank_of(x) - 2, rank_of(x) - 1], True)
    return relax.op.nn.adaptive_avg_pool2d(x, goal)
