"""Gradients of interpolations: products with the transposed interpolation matrices."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor


def upsample_nearest2d_backward(
    grad: Tensor,
    output_size: Sequence[int],
    input_size: Sequence[int],
    scales_h: float | None = None,
    scales_w: float | None = None,
) -> Tensor:
    """Add up what each position was copied to."""
    matrices = (
        _sampling(size, outputs, scale, lambda at: [(math.floor(at), 1.0)], grad)
        for size, outputs, scale in zip(
            input_size[2:], output_size, (scales_h, scales_w), strict=True
        )
    )
    rows, columns = matrices
    return rows.t() @ grad @ columns


def upsample_bilinear2d_backward(
    grad: Tensor,
    output_size: Sequence[int],
    input_size: Sequence[int],
    align_corners: bool,
    scales_h: float | None = None,
    scales_w: float | None = None,
) -> Tensor:
    """Multiply by the transposed interpolation matrices of both axes."""
    matrices = []
    for size, outputs, scale in zip(input_size[2:], output_size, (scales_h, scales_w), strict=True):
        if align_corners:
            step = (size - 1) / (outputs - 1) if outputs > 1 else 0.0
            positions = [index * step for index in range(outputs)]
        else:
            step = 1 / scale if scale else size / outputs
            positions = [max(0.0, (index + 0.5) * step - 0.5) for index in range(outputs)]
        matrices.append(_matrix([_neighbours(at, size) for at in positions], size, grad))
    rows, columns = matrices
    return rows.t() @ grad @ columns


def _sampling(
    size: int,
    outputs: int,
    scale: float | None,
    weights: Callable[[float], list[tuple[int, float]]],
    like: Tensor,
) -> Tensor:
    step = 1 / scale if scale else size / outputs
    sources = [
        [(min(at, size - 1), share) for at, share in weights(index * step)]
        for index in range(outputs)
    ]
    return _matrix(sources, size, like)


def _neighbours(at: float, size: int) -> list[tuple[int, float]]:
    below = min(math.floor(at), size - 1)
    share = at - below
    return [(below, 1 - share), (min(below + 1, size - 1), share)]


def _matrix(rows: list[list[tuple[int, float]]], size: int, like: Tensor) -> Tensor:
    """[outputs, size]: what each output takes from each position."""
    matrix = [[0.0] * size for _ in rows]
    for row, sources in zip(matrix, rows, strict=True):
        for at, share in sources:
            row[at] += share
    return torch.tensor(matrix, dtype=like.dtype, device=like.device)
