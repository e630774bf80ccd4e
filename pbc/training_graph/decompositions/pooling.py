"""Gradients of pooling, and poolings whose own parts have better ones."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from pbc.training_graph.decompositions.convolution_gradients import input_gradient
from pbc.training_graph.decompositions.convolution_layer import ConvolutionLayer, inner, pair

aten = torch.ops.aten


def max_pool_with_indices_backward(
    grad: Tensor,
    x: Tensor,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    ceil_mode: bool,
    indices: Tensor,
) -> Tensor:
    """Send each gradient to where its maximum was; windows that overlap add up.

    aten.max_pool2d_with_indices_backward, and that over volumes.
    """
    return _scattered(grad, x, indices)


def adaptive_max_pool2d_backward(grad: Tensor, x: Tensor, indices: Tensor) -> Tensor:
    """Send each gradient to where its maximum was; bins overlap by a row or a column."""
    return _scattered(grad, x, indices)


def _scattered(grad: Tensor, x: Tensor, indices: Tensor) -> Tensor:
    """Add each gradient at its place of a feature map, whose places are counted row by row."""
    batch, channels, *sizes = x.shape
    zeros = aten.full.default(
        [batch, channels, math.prod(sizes)], 0.0, dtype=grad.dtype, device=grad.device
    )
    spread = aten.scatter_add.default(
        zeros, 2, indices.reshape(batch, channels, -1), grad.reshape(batch, channels, -1)
    )
    grad_x: Tensor = spread.reshape(x.shape)
    return grad_x


def avg_pool2d_backward(
    grad: Tensor,
    x: Tensor,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    ceil_mode: bool,
    count_include_pad: bool,
    divisor_override: int | None,
) -> Tensor:
    """Spread each gradient evenly over its window: a transposed depthwise convolution of ones.

    Where windows count different numbers of values, each gradient is divided by its own before.
    """
    kernel, padding = pair(kernel), pair(padding)
    stride = pair(stride) if stride else kernel
    size, outputs, channels = x.shape[2:], grad.shape[2:], x.shape[1]
    share = 1 / (divisor_override or math.prod(kernel))
    if divisor_override is None and (ceil_mode or (any(padding) and not count_include_pad)):
        rows, columns = (
            _counts(*axis, count_include_pad)
            for axis in zip(size, outputs, kernel, stride, padding, strict=True)
        )
        # Counts, not their inverses: they are the same in any precision.
        grad = grad / torch.tensor([[r * c for c in columns] for r in rows], dtype=grad.dtype)
        share = 1.0
    # With ceil_mode windows may reach beyond the padding.
    reached = [
        max(s, (o - 1) * step - 2 * p + k)
        for s, o, step, p, k in zip(size, outputs, stride, padding, kernel, strict=True)
    ]
    ones = aten.full.default([channels, 1, *kernel], share, dtype=grad.dtype, device=grad.device)
    whole = (*x.shape[:2], *reached)
    layer = ConvolutionLayer(whole, ones.shape, stride, padding, (1, 1), channels)
    return inner(input_gradient(grad, ones, layer), (0, 0), size)


def _counts(
    size: int, outputs: int, kernel: int, stride: int, padding: int, with_padding: bool
) -> list[int]:
    """Positions of an axis that each window counts, as torch does: none beyond the padding."""
    margin = padding if with_padding else 0
    starts = [index * stride - padding for index in range(outputs)]
    return [min(start + kernel, size + margin) - max(start, -margin) for start in starts]


def avg_pool3d(
    x: Tensor,
    kernel: Sequence[int],
    stride: Sequence[int] = (),
    padding: Sequence[int] = (0,),
    ceil_mode: bool = False,
    count_include_pad: bool = True,
    divisor_override: int | None = None,
) -> Tensor:
    """aten.avg_pool3d as sums of slices, axis after axis: in a local response norm along one."""
    kernel, padding = _triple(kernel), _triple(padding)
    stride = _triple(stride) if stride else kernel
    if ceil_mode or (any(padding) and not count_include_pad):
        raise NotImplementedError(
            "the gradient of an average over volumes with ceil_mode or without its padding"
        )
    divisor = divisor_override or math.prod(kernel)
    for axis, (length, step, margin) in enumerate(zip(kernel, stride, padding, strict=True), -3):
        if margin:
            behind = [0, 0] * (-axis - 1)
            x = aten.constant_pad_nd.default(x, [*behind, margin, margin], 0.0)
        last = (x.shape[axis] - length) // step * step
        if (length, step) != (1, 1):
            x = sum(
                (aten.slice.Tensor(x, axis, tap, tap + last + 1, step) for tap in range(1, length)),
                start=aten.slice.Tensor(x, axis, 0, last + 1, step),
            )
    return x / divisor


def _triple(value: Sequence[int]) -> tuple[int, int, int]:
    first, second, third = value if len(value) == 3 else [value[0]] * 3
    return first, second, third


def adaptive_avg_pool2d_backward(grad: Tensor, x: Tensor) -> Tensor:
    """Multiply by the transposed averaging matrices of both axes."""
    if all(size == 1 for size in grad.shape[2:]):
        return (grad / (x.shape[2] * x.shape[3])).expand(x.shape)
    rows = _averaging(x.shape[2], grad.shape[2], grad)
    columns = _averaging(x.shape[3], grad.shape[3], grad)
    return rows.t() @ grad @ columns


def _averaging(size: int, bins: int, like: Tensor) -> Tensor:
    """[bins, size]: what each position counts in each of the adaptive pooling's bins."""
    matrix = [[0.0] * size for _ in range(bins)]
    for index, row in enumerate(matrix):
        start, stop = index * size // bins, -(-(index + 1) * size // bins)
        row[start:stop] = [1 / (stop - start)] * (stop - start)
    return torch.tensor(matrix, dtype=like.dtype, device=like.device)


def adaptive_avg_pool2d(x: Tensor, output_size: Sequence[int]) -> Tensor:
    """aten.adaptive_avg_pool2d; a mean where one value per channel is left.

    torch's own writes its strides into the mean of a feature map whose channels lie last. That
    write is no operator of a graph, and its gradient is zero there.
    """
    if all(size == 1 for size in output_size):
        return x.mean((-2, -1), keepdim=True)
    pooled: Tensor = aten._adaptive_avg_pool2d.default(x, output_size)
    return pooled
