"""Borders around tensors."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from tvm import relax, tirx, topi

from pbc.targets.tvm.operators.family import Family
from pbc.targets.tvm.scope import (
    Expr,
    Scope,
    kind_of,
    rank_of,
    shape_of,
)

aten = torch.ops.aten

OPERATORS = Family()


@OPERATORS.converts(aten.constant_pad_nd.default)
def _constant_pad(scope: Scope, x: Expr, pad: Sequence[int], value: float = 0.0) -> Expr:
    before, after = [0] * rank_of(x), [0] * rank_of(x)
    for number in range(len(pad) // 2):
        before[-1 - number], after[-1 - number] = pad[2 * number], pad[2 * number + 1]
    for axis in range(rank_of(x)):
        # A negative padding cuts off.
        if before[axis] < 0 or after[axis] < 0:
            start, end = max(0, -before[axis]), shape_of(x)[axis] + min(0, after[axis])
            x = scope.emit(relax.op.strided_slice(x, [axis], [start], [end], assume_inbound=True))
    before, after = [max(0, size) for size in before], [max(0, size) for size in after]
    if not any((*before, *after)):
        return x
    fill = tirx.const(value, kind_of(x))
    return scope.compute(lambda x: topi.nn.pad(x, before, after, fill), x)
