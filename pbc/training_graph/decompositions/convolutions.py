"""Convolutions that are taken apart, or joined with a norm, before they are differentiated."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from pbc.training_graph.decompositions.constants import is_frozen
from pbc.training_graph.decompositions.convolution_layer import ConvolutionLayer, connections, pair
from pbc.training_graph.decompositions.norms import scale_and_shift

aten = torch.ops.aten


def conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Sequence[int] = (1, 1),
    padding: Sequence[int] = (0, 0),
    dilation: Sequence[int] = (1, 1),
    groups: int = 1,
) -> Tensor:
    """aten.conv2d; a trained depthwise one over small feature maps as a matrix product per channel.

    Engines are an order of magnitude slower at depthwise kernels that are no constants.
    """
    positions = math.prod(x.shape[2:])
    depthwise = groups == x.shape[1] == weight.shape[0] and groups > 1
    if not depthwise or is_frozen(weight) or positions > _SMALL_CHANNEL:
        result: Tensor = aten.conv2d.default(x, weight, bias, stride, padding, dilation, groups)
        return result
    layer = ConvolutionLayer(
        x.shape, weight.shape, pair(stride), pair(padding), pair(dilation), groups
    )
    outputs = layer.outputs
    where = connections(layer, outputs)
    matrices = weight.reshape(groups, -1) @ where.to(weight.dtype)
    matrices = matrices.reshape(groups, positions, math.prod(outputs))
    rows = x.reshape(-1, groups, positions).transpose(0, 1) @ matrices
    y = rows.transpose(0, 1).reshape(-1, groups, *outputs)
    return y if bias is None else y + bias.reshape(1, -1, 1, 1)


# Positions of a channel up to which a matrix of them by outputs is small.
_SMALL_CHANNEL = 64


def normed_convolution(convolution: Sequence[Any], norm: Sequence[Any]) -> Tensor:
    """aten.conv2d of these arguments, and a batch norm of frozen statistics of what comes out.

    As one convolution with a scaled kernel: no other operator then touches what comes out, neither
    here nor in the gradient, and none of it is kept.
    """
    x, weight, bias, *window = convolution if len(convolution) > 2 else (*convolution, None)
    norm_weight, norm_bias, mean, variance, _, _, epsilon, _ = norm
    scale, shift = scale_and_shift(norm_weight, norm_bias, mean, variance, epsilon)
    shift = shift if bias is None else shift + bias * scale
    # As a matrix: engines are slow at sums over an axis in the middle, which is the gradient's.
    kernel = weight.reshape(weight.shape[0], -1) * scale.unsqueeze(1)
    return conv2d(x, kernel.reshape(weight.shape), shift, *window)
