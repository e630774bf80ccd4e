"""The gradients of convolutions, plain and transposed ones."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from pbc.training_graph.decompositions.constants import is_frozen
from pbc.training_graph.decompositions.convolution_layer import (
    ConvolutionLayer,
    connections,
    inner,
    pad,
    spread,
)

aten = torch.ops.aten


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

    The gradient of a convolution's input is the transposed convolution, and that of a transposed
    one's input the plain convolution (Dumoulin and Visin, A guide to convolution arithmetic, 2016).
    """
    layer = ConvolutionLayer(x.shape, weight.shape, stride, padding, dilation, groups)
    if transposed:
        # With the kernel's values it is the layer whose gradient this one computes.
        layer = dataclasses.replace(layer, x=grad.shape)
    grad_x = grad_weight = grad_bias = None
    if wanted[0]:
        grad_x = (
            _convolved(grad, weight, layer, x)
            if transposed
            else input_gradient(grad, weight, layer)
        )
    if wanted[1]:
        sides = (x, grad) if transposed else (grad, x)
        grad_weight = weight_gradient(*sides, layer)
    if wanted[2]:
        grad_bias = grad.sum([0, *range(2, grad.dim())])
    return grad_x, grad_weight, grad_bias


def input_gradient(grad: Tensor, weight: Tensor, layer: ConvolutionLayer) -> Tensor:
    """Return the gradient of a plain convolution's input, in the shape of `layer.x`.

    Engines are slow at transposed convolutions, so it has two more forms: by a frozen kernel of
    stride one, the convolution with the flipped kernel, which is a constant then; by a trained
    kernel over small feature maps, one matrix product of all images, tap beside tap (im2col;
    Chellapilla et al., IWFHR 2006).
    """
    if is_frozen(weight) and all(s == 1 for s in layer.stride):
        return _input_gradient_by_flipped_kernel(grad, weight, layer)
    if _is_small(grad, layer):
        return _input_gradient_by_columns(grad, weight, layer)
    return _input_gradient_transposed(grad, weight, layer)


def _convolved(grad: Tensor, weight: Tensor, layer: ConvolutionLayer, x: Tensor) -> Tensor:
    """The gradient of a transposed convolution's input: the layer's own convolution."""
    zeros = [0] * len(layer.stride)
    grad_x: Tensor = aten.convolution.default(
        grad, weight, None, layer.stride, layer.padding, layer.dilation, False, zeros, layer.groups
    )
    # An output padding of a stride and more makes windows that no value of x was spread over.
    return inner(grad_x, zeros, x.shape[2:])


def _is_small(grad: Tensor, layer: ConvolutionLayer) -> bool:
    return layer.groups == 1 and math.prod(grad.shape[2:]) <= _SMALL_FEATURE_MAP


# Output positions per channel up to which all images share one matrix product.
_SMALL_FEATURE_MAP = 256


def _rows(x: Tensor) -> Tensor:
    """[channels, everything else] of [batch, channels, …]."""
    return x.transpose(0, 1).reshape(x.shape[1], -1)


def weight_gradient(grad: Tensor, x: Tensor, layer: ConvolutionLayer) -> Tensor:
    """One product per tap of the kernel, or all in one over small feature maps (im2col)."""
    outputs, taps, groups = grad.shape[2:], layer.taps, layer.groups
    depthwise = groups > 1 and tuple(layer.weight[:2]) == (groups, 1)
    if depthwise and layer.x[-1] <= _SMALL_ROW:
        return _depthwise_weight_gradient(grad, x, layer)
    x = layer.padded(x)
    if groups == 1 and (_is_small(grad, layer) or len(taps) == 1):
        columns = [_rows(layer.seen(x, tap, outputs)) for tap in taps]
        stacked = columns[0] if len(taps) == 1 else torch.stack(columns, 1)
        # [channels, taps]: the order in which the weight has them.
        stacked = stacked.reshape(layer.weight[1] * len(taps), -1)
        return (_rows(grad) @ stacked.t()).reshape(layer.weight)
    if groups == 1:
        rows = _rows(grad)
        products = [rows @ _rows(layer.seen(x, tap, outputs)).t() for tap in taps]
        return torch.stack(products, -1).reshape(layer.weight)
    batch, per_group, per_output = layer.x[0], layer.weight[1], layer.weight[0] // groups
    if depthwise:
        # One multiplication and one sum per tap of the kernel.
        axes = [0, *range(2, grad.dim())]
        sums = [(layer.seen(x, tap, outputs) * grad).sum(axes) for tap in taps]
        return torch.stack(sums, -1).reshape(layer.weight)
    by_group = grad.reshape(batch, groups, per_output, -1)
    products = [
        (
            by_group
            @ layer.seen(x, tap, outputs).reshape(batch, groups, per_group, -1).transpose(-1, -2)
        ).sum(0)
        for tap in taps
    ]
    return torch.stack(products, -1).reshape(layer.weight)


# Positions of a row up to which products of rows beat a multiplication and a sum per tap.
_SMALL_ROW = 64


def _depthwise_weight_gradient(grad: Tensor, x: Tensor, layer: ConvolutionLayer) -> Tensor:
    """Per channel and row of the kernel, what every input column times every output column gives.

    Those are matrix products over all images and rows; of each, a tap takes its diagonal.
    """
    channels, columns, out_columns = layer.x[1], layer.x[-1], grad.shape[-1]
    # [channels, rows…, batch, columns]
    order = [*range(1, x.dim() - 1), 0, x.dim() - 1]
    images, slopes = x.permute(order), grad.permute(order)
    margins = [0, 0, 0, 0, *(p for p in reversed(layer.padding[:-1]) for _ in range(2))]
    if any(margins):
        images = aten.constant_pad_nd.default(images, margins, 0.0)
    slopes = slopes.reshape(channels, -1, out_columns)
    products = []
    for tap in itertools.product(*(range(size) for size in layer.kernel[:-1])):
        seen = images
        for axis, index in enumerate(tap):
            start, step = index * layer.dilation[axis], layer.stride[axis]
            stop = start + (grad.shape[2 + axis] - 1) * step + 1
            seen = aten.slice.Tensor(seen, 1 + axis, start, stop, step)
        seen = seen.reshape(channels, -1, columns)
        products.append(seen.transpose(1, 2) @ slopes)
    row = ConvolutionLayer(
        (1, 1, columns),
        (1, 1, layer.kernel[-1]),
        layer.stride[-1:],
        layer.padding[-1:],
        layer.dilation[-1:],
        1,
    )
    where = connections(row, [out_columns])
    stacked = torch.stack(products, 1).reshape(-1, columns * out_columns)
    return (stacked @ where.to(grad.dtype).t()).reshape(layer.weight)


def _input_gradient_by_columns(grad: Tensor, weight: Tensor, layer: ConvolutionLayer) -> Tensor:
    """One product to what every tap contributes, and the contributions added up in place."""
    (batch, channels, *size), outputs, taps = layer.x, grad.shape[2:], layer.taps
    columns = weight.reshape(layer.weight[0], -1).t() @ _rows(grad)
    columns = columns.reshape(channels, len(taps), batch, *outputs)
    total: Tensor | None = None
    whole = [s + 2 * p for s, p in zip(size, layer.padding, strict=True)]
    for number, tap in enumerate(taps):
        part = spread(aten.select.int(columns, 1, number), layer.stride)
        starts = [index * d for index, d in zip(tap, layer.dilation, strict=True)]
        margins = [
            (start, total_size - start - part_size)
            for start, total_size, part_size in zip(starts, whole, part.shape[2:], strict=True)
        ]
        part = pad(part, margins)
        total = part if total is None else total + part
    assert total is not None
    return inner(total, layer.padding, size).transpose(0, 1)


def _input_gradient_by_flipped_kernel(
    grad: Tensor, weight: Tensor, layer: ConvolutionLayer
) -> Tensor:
    """The convolution of the gradient with the flipped kernel; the stride is one."""
    reach = [d * (k - 1) for d, k in zip(layer.dilation, layer.kernel, strict=True)]
    margins = [r - p for r, p in zip(reach, layer.padding, strict=True)]
    # Padding beyond the kernel's reach only ever met zeros.
    grad = inner(grad, [max(0, -m) for m in margins], [
        size - 2 * max(0, -m) for size, m in zip(grad.shape[2:], margins, strict=True)
    ])  # fmt: skip
    ones, zeros = [1] * len(margins), [0] * len(margins)
    grad_x: Tensor = aten.convolution.default(
        grad,
        _flipped(weight, layer.groups),
        None,
        ones,
        [max(0, m) for m in margins],
        layer.dilation,
        False,
        zeros,
        layer.groups,
    )
    return grad_x


def _flipped(weight: Tensor, groups: int) -> Tensor:
    """Inputs and outputs of each group swapped, the kernel flipped."""
    outputs, per_group, *kernel = weight.shape
    if (per_group, outputs) != (1, groups):
        weight = weight.reshape(groups, outputs // groups, per_group, *kernel).transpose(1, 2)
        weight = weight.reshape(groups * per_group, outputs // groups, *kernel)
    flipped = [axis for axis, size in enumerate(kernel, 2) if size > 1]
    return aten.flip.default(weight, flipped) if flipped else weight


def _input_gradient_transposed(grad: Tensor, weight: Tensor, layer: ConvolutionLayer) -> Tensor:
    """The transposed convolution (Dumoulin and Visin, A guide to convolution arithmetic, 2016)."""
    missing = [
        # Rows at the end that no window reached: their gradient is zero.
        layer.x[2 + axis] - ((grad.shape[2 + axis] - 1) * s - 2 * p + d * (k - 1) + 1)
        for axis, (s, p, d, k) in enumerate(
            zip(layer.stride, layer.padding, layer.dilation, layer.kernel, strict=True)
        )
    ]
    grad_x: Tensor = aten.convolution.default(
        grad, weight, None, layer.stride, layer.padding, layer.dilation, True, missing, layer.groups
    )
    return grad_x
