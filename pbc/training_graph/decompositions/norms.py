"""Norms: of batches with frozen statistics, by the root of a mean of squares, of vectors."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

aten = torch.ops.aten


def vector_norm(
    x: Tensor,
    order: float = 2,
    axes: Sequence[int] | None = None,
    keepdim: bool = False,
    *,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """aten.linalg_vector_norm; the Euclidean one from a sum, whose gradient at zero is zero.

    torch's own writes that zero into the gradient.
    """
    if order != 2 or dtype is not None:
        norm: Tensor = aten.linalg_vector_norm.default(x, order, axes, keepdim, dtype=dtype)
        return norm
    squares = x.square().sum(list(range(x.dim()) if axes is None else axes), keepdim)
    # Below the rounding of any norm but zero.
    euclidean: Tensor = (squares + 1e-30).sqrt()
    return euclidean


def norm(x: Tensor, order: float | None, axes: Sequence[int], keepdim: bool = False) -> Tensor:
    """aten.norm, the older spelling of `vector_norm`, in which None is the Euclidean one."""
    return vector_norm(x, 2 if order is None else order, axes, keepdim)


def scale_and_shift(
    weight: Tensor | None, bias: Tensor | None, mean: Tensor, variance: Tensor, epsilon: float
) -> tuple[Tensor, Tensor]:
    """Return the factor and the addend of a batch norm with these statistics."""
    inverse = (variance + epsilon).rsqrt()
    scale = inverse if weight is None else weight * inverse
    return scale, -mean * scale if bias is None else bias - mean * scale


def batch_norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    variance: Tensor,
    training: bool,
    momentum: float,
    epsilon: float,
    cudnn_enabled: bool,
) -> Tensor:
    """aten.batch_norm with frozen statistics: one multiplication and one addition per value."""
    if training:
        raise NotImplementedError("a batch norm that computes the statistics of its batch")
    scale, shift = scale_and_shift(weight, bias, mean, variance, epsilon)
    shape = (1, -1, *[1] * (x.dim() - 2))
    return x * scale.reshape(shape) + shift.reshape(shape)


def rms_norm(
    x: Tensor, shape: Sequence[int], weight: Tensor | None = None, epsilon: float | None = None
) -> Tensor:
    """aten.rms_norm over the last axes; torch's own parts of it write into one another."""
    axes = list(range(x.dim() - len(shape), x.dim()))
    least = torch.finfo(x.dtype).eps if epsilon is None else epsilon
    normal = x * (x.square().mean(axes, keepdim=True) + least).rsqrt()
    return normal if weight is None else normal * weight
