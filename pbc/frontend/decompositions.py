"""Decompositions: torch's own, and a few where those are missing or write what engines lack."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from pbc.ir import borders

aten = torch.ops.aten


def table() -> dict[Any, Callable[..., Any]]:
    """For each operator, a function of the same arguments that calls smaller ones."""
    return {
        **torch.export.default_decompositions(),
        **borders.TABLE,
        aten.bilinear.default: _bilinear,
        aten.instance_norm.default: _instance_norm,
        aten.kthvalue.default: _kth_value,
        aten.linalg_vector_norm.default: _vector_norm,
        aten.median.dim: _median,
    }


def _bilinear(x: Tensor, y: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Multiply one input by all of the weight, and sum that over the other."""
    outputs, _, columns = weight.shape
    rows = x @ weight.transpose(0, 1).flatten(1)
    product: Tensor = (rows.unflatten(-1, (outputs, columns)) * y.unsqueeze(-2)).sum(-1)
    return product if bias is None else product + bias


def _kth_value(x: Tensor, k: int, axis: int = -1, keep: bool = False) -> tuple[Tensor, Tensor]:
    """Take the value that sorting brings to this place."""
    values, places = (part.select(axis, k - 1) for part in x.sort(axis))
    return (values.unsqueeze(axis), places.unsqueeze(axis)) if keep else (values, places)


def _median(x: Tensor, axis: int, keep: bool = False) -> tuple[Tensor, Tensor]:
    """Take the lower one of two values in the middle."""
    return _kth_value(x, (x.shape[axis] + 1) // 2, axis, keep)


def _instance_norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor | None,
    variance: Tensor | None,
    use_input_stats: bool,
    momentum: float,
    epsilon: float,
    _cudnn: bool,
) -> Any:
    """Norm each channel as a group of its own; torch repeats weights for each image of a batch."""
    if use_input_stats:
        return aten.group_norm.default(x, x.shape[1], weight, bias, epsilon)
    return aten.batch_norm.default(x, weight, bias, mean, variance, False, momentum, epsilon, False)


def _vector_norm(
    x: Tensor,
    order: float = 2,
    axes: Sequence[int] | None = None,
    keep: bool = False,
    dtype: torch.dtype | None = None,
) -> Any:
    """Take the root of the sum of squares; other norms stay whole."""
    if order != 2 or dtype is not None:
        return NotImplemented
    total = (x * x).sum(list(range(x.dim())) if axes is None else list(axes), keepdim=keep)
    # At zero the norm's gradient is zero, and the root's is not a number.
    return total.clamp_min(torch.finfo(x.dtype).tiny).sqrt()
