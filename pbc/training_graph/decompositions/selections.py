"""What is written to one place along an axis, as the gradient of a maximum is."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

aten = torch.ops.aten


def scatter_src(x: Tensor, axis: int, index: Tensor, source: Tensor) -> Any:
    """Write one value along an axis, where a comparison finds its place; more are left whole.

    index: int64, of x's shape but for an extent of 1 along the axis. Inference engines compare
    faster than they scatter, if they do.
    """
    if list(source.shape) != list(index.shape):
        return NotImplemented
    return _written(x, axis, index, source)


def scatter_value(x: Tensor, axis: int, index: Tensor, value: float) -> Any:
    """Write one number along an axis, like `scatter_src`."""
    return _written(x, axis, index, aten.scalar_tensor.default(value, dtype=x.dtype))


def _written(x: Tensor, axis: int, index: Tensor, source: Tensor) -> Any:
    expected = list(x.shape)
    expected[axis] = 1
    if list(index.shape) != expected:
        return NotImplemented
    shape = [1] * x.dim()
    shape[axis] = -1
    places = torch.arange(x.shape[axis]).reshape(shape)
    return torch.where(places == index, source, x)
