"""Sums over members: the gradient of values that several elements share."""

from __future__ import annotations

import torch
from torch import Tensor

aten = torch.ops.aten


def index_add(x: Tensor, axis: int, index: Tensor, source: Tensor, *, alpha: float = 1) -> Tensor:
    """Add slices of a tensor where an index says; engines know it as a scatter."""
    if alpha != 1:
        source = source * alpha
    shape = [1] * source.dim()
    shape[axis] = -1
    places = index.long().reshape(shape).expand_as(source)
    added: Tensor = aten.scatter_add.default(x, axis, places, source)
    return added
