"""Reads and additions at places that a tensor of indices names."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from tvm import relax, te

from pbc.targets.tvm.operators.family import Family
from pbc.targets.tvm.scope import (
    Expr,
    Scope,
    rank_of,
    require,
    shape_of,
)

aten = torch.ops.aten

OPERATORS = Family()


@OPERATORS.converts(aten.index_select.default)
def _index_select(scope: Scope, x: Expr, axis: int, index: Expr) -> Expr:
    return relax.op.take(x, index, axis % rank_of(x), "clip")


@OPERATORS.converts(aten.embedding.default)
def _embedding(scope: Scope, weight: Expr, indices: Expr, *_: Any) -> Expr:
    return relax.op.take(weight, indices, 0, "clip")


@OPERATORS.converts(aten.index.Tensor)
def _index(scope: Scope, x: Expr, indices: Sequence[Any]) -> Expr:
    given = [(axis, index) for axis, index in enumerate(indices) if index is not None]
    require(len(given) == 1 and given[0][1].ty.dtype != "bool", "several indices or a mask")
    axis, index = given[0]
    return relax.op.take(x, index, axis, "clip")


@OPERATORS.converts(aten.gather.default)
def _gather(scope: Scope, x: Expr, axis: int, index: Expr) -> Expr:
    axis %= rank_of(x)

    def gather(x: Any, index: Any) -> Any:
        return te.compute(index.shape, lambda *at: x(*at[:axis], index(*at), *at[axis + 1 :]))

    return scope.compute(gather, x, index)


@OPERATORS.converts(aten.scatter_add.default)
def _scatter_add(scope: Scope, x: Expr, axis: int, index: Expr, source: Expr) -> Expr:
    sizes = zip(shape_of(index), shape_of(source), strict=True)
    require(all(scope.equal(one, other) for one, other in sizes), "a source larger than its index")
    return relax.op.scatter_elements(x, index, source, axis % rank_of(x), "add")
