"""Interpolation of feature maps to another size."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tvm import te

from pbc.targets.tvm.operators.family import Family
from pbc.targets.tvm.scope import (
    Expr,
    Scope,
    constant,
    shape_of,
    zero,
)

aten = torch.ops.aten

OPERATORS = Family()


@OPERATORS.converts(
    aten.upsample_bilinear2d.vec,
    aten.upsample_bicubic2d.vec,
    aten.upsample_nearest2d.vec,
    aten._upsample_bilinear2d_aa.vec,
    aten._upsample_bicubic2d_aa.vec,
    aten.upsample_bilinear2d.default,
    aten.upsample_bicubic2d.default,
    aten.upsample_nearest2d.default,
    aten._upsample_bilinear2d_aa.default,
    aten._upsample_bicubic2d_aa.default,
)
def _upsample(scope: Scope, x: Expr, *options: Any, **named: Any) -> Expr:
    """As what torch's own operator does to a basis: sums of a few rows, then of a few columns."""
    *_, height, width = shape_of(x)
    goal = [int(size) for size in scope.node.meta["val"].shape[-2:]]
    target = scope.node.target
    assert isinstance(target, torch._ops.OpOverload)
    # A picture that changes along one axis alone shows what happens along that axis.
    rows = torch.eye(height).reshape(1, height, height, 1).expand(1, height, height, width)
    columns = torch.eye(width).reshape(1, width, 1, width).expand(1, width, height, width)
    options = tuple(None if _is_size_list(option) else option for option in options)
    down = _applied(target, rows, goal, options, named)[0, :, :, 0]
    across = _applied(target, columns, goal, options, named)[0, :, 0, :]
    x = _gathered(scope, x, 2, down.numpy())
    return _gathered(scope, x, 3, across.numpy())


def _is_size_list(option: Any) -> bool:
    return isinstance(option, (list, tuple)) and bool(option) and not isinstance(option[0], float)


def _applied(
    target: Any, picture: Tensor, goal: list[int], options: Sequence[Any], named: Mapping[str, Any]
) -> Tensor:
    sized = list(options)
    # The vec overloads take a size or factors; the other is None.
    if not (named.get("scale_factors") or (sized and isinstance(sized[-1], (list, tuple)))):
        sized[:1] = [goal]
    result: Tensor = target(picture.contiguous(), *sized, **named)
    return result


def _gathered(scope: Scope, x: Expr, axis: int, weights: np.ndarray) -> Expr:
    """Along an axis, sums of values by weights [old size, new size], most of them zero."""
    taps = int((weights != 0).sum(0).max())
    order = np.argsort(weights == 0, axis=0, kind="stable")[:taps]
    places, factors = order.astype(np.int32), np.take_along_axis(weights, order, 0)

    def gather(x: Any, places: Any, factors: Any) -> Any:
        shape = [*x.shape[:axis], weights.shape[1], *x.shape[axis + 1 :]]

        def value(*at: Any) -> Any:
            reads = [x(*at[:axis], places(tap, at[axis]), *at[axis + 1 :]) for tap in range(taps)]
            if taps == 1 and (factors_are_one := bool((weights.sum(0) == 1).all())):
                assert factors_are_one
                return reads[0]
            return sum(
                (read * factors(tap, at[axis]) for tap, read in enumerate(reads)), start=zero(x)
            )

        return te.compute(shape, value)

    return scope.compute(gather, x, constant(places, "int32"), constant(factors, "float32"))
