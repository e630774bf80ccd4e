"""Interpolations as products with matrices; their gradients are those with transposed ones."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

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


def upsample_bilinear2d_aa(x: Tensor, *given: Any) -> Tensor:
    """aten._upsample_bilinear2d_aa: of sizes and scales, or of either."""
    return _antialiased(x, lambda at: max(0.0, 1 - abs(at)), 1.0, given)


def upsample_bicubic2d_aa(x: Tensor, *given: Any) -> Tensor:
    """aten._upsample_bicubic2d_aa: of sizes and scales, or of either."""
    return _antialiased(x, _keys, 2.0, given)


def _keys(at: float) -> float:
    """Keys' cubic convolution (IEEE TASSP 1981) with a = -0.5."""
    at = abs(at)
    if at < 1:
        return (1.5 * at - 2.5) * at * at + 1
    return ((-0.5 * at + 2.5) * at - 4) * at + 2 if at < 2 else 0.0


def _antialiased(
    x: Tensor, kernel: Callable[[float], float], reach: float, given: Sequence[Any]
) -> Tensor:
    """Multiply by the matrices of a kernel that is as wide as what a smaller output skips.

    given: output_size, align_corners, and a scale for each axis or a list of both.
    """
    outputs, align_corners, *scales = given
    if len(scales) == 1:
        scales = [None, None] if scales[0] is None else list(scales[0])
    scales = scales or [None, None]
    matrices = []
    for axis, (size, scale) in enumerate(zip(x.shape[2:], scales, strict=True)):
        count = int(size * scale) if outputs is None else outputs[axis]
        if align_corners:
            step = (size - 1) / (count - 1) if count > 1 else 0.0
        else:
            step = 1 / scale if scale else size / count
        width = max(step, 1.0)
        rows = []
        for index in range(count):
            centre = step * (index + 0.5)
            first = max(int(centre - reach * width + 0.5), 0)
            last = min(int(centre + reach * width + 0.5), size)
            shares = [(at, kernel((at - centre + 0.5) / width)) for at in range(first, last)]
            total = sum(share for _, share in shares)
            rows.append([(at, share / total) for at, share in shares])
        matrices.append(_matrix(rows, size, x))
    along_rows, along_columns = matrices
    return along_rows @ x @ along_columns.t()


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
