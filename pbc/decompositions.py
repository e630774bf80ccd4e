"""What torch has no decomposition for: gradients in terms of operators that inference engines have.

Each function has the signature of the operator that it stands for, and computes what that does.
`table` adds them to torch's own; `DIFFERENTIABLE` replaces what is better taken apart before it is
differentiated than after.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._decomp import core_aten_decompositions

aten = torch.ops.aten

# Forward operators that every engine has as one: taking them apart costs time and precision.
WHOLE = (
    aten._log_softmax.default,
    aten._softmax.default,
    aten.addmm.default,
    aten.avg_pool2d.default,
    aten.elu.default,
    aten.gelu.default,
    aten.hardsigmoid.default,
    aten.hardswish.default,
    aten.hardtanh.default,
    aten.leaky_relu.default,
    aten.max_pool2d_with_indices.default,
    aten.native_group_norm.default,
    aten.native_layer_norm.default,
    aten.silu.default,
    aten.upsample_bilinear2d.vec,
    aten.upsample_nearest2d.vec,
)


@functools.cache
def table() -> dict[Any, Callable[..., Any]]:
    """Return torch's decompositions without those of `WHOLE`, and with ours."""
    known: dict[Any, Callable[..., Any]] = dict(core_aten_decompositions())
    for op in WHOLE:
        known.pop(op, None)
    known[aten.convolution_backward.default] = convolution_backward
    known[aten.max_pool2d_with_indices_backward.default] = max_pool2d_with_indices_backward
    known[aten.avg_pool2d_backward.default] = avg_pool2d_backward
    known[aten._adaptive_avg_pool2d_backward.default] = adaptive_avg_pool2d_backward
    known[aten.upsample_nearest2d_backward.default] = upsample_nearest2d_backward
    known[aten.upsample_bilinear2d_backward.default] = upsample_bilinear2d_backward
    return known


# ---- convolution ---------------------------------------------------------------------------


def convolution_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    bias_sizes: Sequence[int] | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    transposed: bool,
    output_padding: Sequence[int],
    groups: int,
    wanted: Sequence[bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """aten.convolution_backward of a convolution over any number of spatial axes.

    The input's gradient is the transposed convolution (Dumoulin and Visin, A guide to convolution
    arithmetic, 2016); the weight's is the cheapest of four forms, by the kernel's shape.
    Raises NotImplementedError for the backward of a transposed convolution.
    """
    if transposed:
        raise NotImplementedError("the gradient of a transposed convolution")
    grad_x = grad_weight = grad_bias = None
    if wanted[0]:
        missing = [
            # Rows at the end that no window reached: their gradient is zero.
            x.shape[2 + axis]
            - ((grad.shape[2 + axis] - 1) * s - 2 * p + d * (weight.shape[2 + axis] - 1) + 1)
            for axis, (s, p, d) in enumerate(zip(stride, padding, dilation, strict=True))
        ]
        grad_x = aten.convolution.default(
            grad, weight, None, stride, padding, dilation, True, missing, groups
        )
    if wanted[1]:
        grad_weight = _weight_gradient(grad, x, weight, stride, padding, dilation, groups)
    if wanted[2]:
        grad_bias = grad.sum([0, *range(2, grad.dim())])
    return grad_x, grad_weight, grad_bias


def _weight_gradient(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Tensor:
    kernel = weight.shape[2:]
    if math.prod(kernel) == 1 and not any(padding) and groups == 1:
        # A matrix product over everything but the channels.
        seen = _shifted(x, (0,) * len(kernel), grad.shape[2:], stride, padding, dilation)
        rows = grad.transpose(0, 1).reshape(weight.shape[0], -1)
        columns = seen.transpose(0, 1).reshape(weight.shape[1], -1)
        return (rows @ columns.t()).reshape(weight.shape)
    taps = (_shifted(x, tap, grad.shape[2:], stride, padding, dilation) for tap in _taps(kernel))
    batch, per_group, outputs = x.shape[0], weight.shape[1], weight.shape[0] // groups
    if per_group == 1 and outputs == 1:
        # Depthwise: one multiplication and one sum per tap of the kernel.
        axes = [0, *range(2, grad.dim())]
        return torch.stack([(tap * grad).sum(axes) for tap in taps], -1).reshape(weight.shape)
    # As matrix products: [outputs, positions] by [positions, channels], tap by tap.
    by_group = grad.reshape(batch, groups, outputs, -1)
    products = [
        (by_group @ tap.reshape(batch, groups, per_group, -1).transpose(-1, -2)).sum(0)
        for tap in taps
    ]
    return torch.stack(products, -1).reshape(weight.shape)


def _taps(kernel: Sequence[int]) -> list[tuple[int, ...]]:
    positions: list[tuple[int, ...]] = [()]
    for size in kernel:
        positions = [(*before, index) for before in positions for index in range(size)]
    return positions


def _shifted(
    x: Tensor,
    tap: Sequence[int],
    outputs: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> Tensor:
    """What one tap of the kernel multiplies, at every output position."""
    if any(padding):
        x = aten.constant_pad_nd.default(x, [p for p in reversed(padding) for _ in range(2)], 0.0)
    for axis, (index, size, s, d) in enumerate(zip(tap, outputs, stride, dilation, strict=True)):
        start = index * d
        x = aten.slice.Tensor(x, 2 + axis, start, start + (size - 1) * s + 1, s)
    return x


# ---- pooling -------------------------------------------------------------------------------


def max_pool2d_with_indices_backward(
    grad: Tensor,
    x: Tensor,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    ceil_mode: bool,
    indices: Tensor,
) -> Tensor:
    """Send each gradient to where its maximum was; windows that overlap add up."""
    batch, channels, height, width = x.shape
    zeros = aten.full.default(
        [batch, channels, height * width], 0.0, dtype=grad.dtype, device=grad.device
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
    """Spread each gradient evenly over its window: a transposed depthwise convolution of ones."""
    padding = _pair(padding)
    if ceil_mode or (any(padding) and not count_include_pad):
        raise NotImplementedError(
            "the gradient of an average pooling with ceil_mode or without its padding"
        )
    kernel, stride = _pair(kernel), _pair(stride) if stride else _pair(kernel)
    channels = x.shape[1]
    share = 1 / (divisor_override or math.prod(kernel))
    ones = aten.full.default([channels, 1, *kernel], share, dtype=grad.dtype, device=grad.device)
    grad_x, _, _ = convolution_backward(
        grad, x, ones, None, stride, padding, (1, 1), False, (0, 0), channels, (True, False, False)
    )
    assert grad_x is not None
    return grad_x


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


# ---- upsampling ----------------------------------------------------------------------------


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


def _pair(value: Sequence[int]) -> tuple[int, int]:
    first, second = value if len(value) == 2 else (value[0], value[0])
    return first, second


# ---- taken apart before differentiation ----------------------------------------------------


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """aten.linear as one matrix product over all leading axes.

    torch's own broadcasts the weight over the batch for inputs of three axes, and engines then
    make the copies.
    """
    rows = x.reshape(-1, x.shape[-1]) if x.dim() != 2 else x
    product = rows @ weight.t() if bias is None else aten.addmm.default(bias, rows, weight.t())
    return product.reshape(*x.shape[:-1], weight.shape[0]) if x.dim() != 2 else product


def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None = None,
    dropout: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """aten.scaled_dot_product_attention from products and a softmax, [..., tokens, head_dim]."""
    if is_causal or enable_gqa or dropout:
        raise NotImplementedError("the gradient of causal or grouped attention, or with dropout")
    factor = query.shape[-1] ** -0.5 if scale is None else scale
    scores = (query * factor) @ key.transpose(-1, -2)
    if mask is not None:
        if mask.dtype == torch.bool:
            mask = torch.where(mask, 0.0, -math.inf)
        scores = scores + mask
    return torch.softmax(scores, -1) @ value


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
    inverse = (variance + epsilon).rsqrt()
    scale = inverse if weight is None else weight * inverse
    shift = -mean * scale if bias is None else bias - mean * scale
    shape = (1, -1, *[1] * (x.dim() - 2))
    return x * scale.reshape(shape) + shift.reshape(shape)


DIFFERENTIABLE: dict[Any, Callable[..., Any]] = {
    aten.linear.default: linear,
    aten.scaled_dot_product_attention.default: scaled_dot_product_attention,
    aten.batch_norm.default: batch_norm,
}
