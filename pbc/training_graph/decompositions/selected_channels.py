"""Layers of which some channels' weights train: a backward keeps what those read, and no more.

Such a weight is a frozen tensor with θ copied to where an index says. The gradient with respect to
θ is that of the layer of these channels alone, sliced before it is computed and not after (Lin et
al., On-Device Training Under 256KB Memory, NeurIPS 2022, section 3.3).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from pbc.training_graph.decompositions.convolution_gradients import weight_gradient
from pbc.training_graph.decompositions.convolution_layer import ConvolutionLayer, pair
from pbc.training_graph.decompositions.convolutions import conv2d
from pbc.training_graph.decompositions.matrices import linear

aten = torch.ops.aten

Gradient = Callable[[Tensor, Tensor], Tensor]
"""Of a result's gradient and the input that was kept, the gradient of θ."""


def selected_conv2d(
    selected: tuple[Tensor, int, Tensor, Tensor],
    x: Tensor,
    bias: Tensor | None = None,
    stride: Sequence[int] = (1, 1),
    padding: Sequence[int] = (0, 0),
    dilation: Sequence[int] = (1, 1),
    groups: int = 1,
) -> Tensor:
    """aten.conv2d whose weight is index_copy(*selected): frozen, axis, index int64 [n], θ.

    axis: 1, of input channels, or 0 of a depthwise convolution.
    """
    _, axis, index, theta = selected
    y = conv2d(x, _whole(selected), bias, stride, padding, dilation, groups)

    def gradient(grad: Tensor, kept: Tensor) -> Tensor:
        if axis == 0:
            grad = aten.index_select.default(grad, 1, index)
        layer = ConvolutionLayer(
            kept.shape,
            theta.shape,
            pair(stride),
            pair(padding),
            pair(dilation),
            theta.shape[0] if axis == 0 else 1,
        )
        return weight_gradient(grad, kept, layer)

    return _with_gradient(y, x, 1, selected, gradient)


def selected_linear(
    selected: tuple[Tensor, int, Tensor, Tensor], x: Tensor, bias: Tensor | None = None
) -> Tensor:
    """aten.linear whose weight is index_copy(*selected): frozen, axis 1, index int64 [n], θ."""
    y = linear(x, _whole(selected), bias)

    def gradient(grad: Tensor, kept: Tensor) -> Tensor:
        return grad.reshape(-1, grad.shape[-1]).t() @ kept.reshape(-1, kept.shape[-1])

    return _with_gradient(y, x, x.dim() - 1, selected, gradient)


def index_copy(x: Tensor, axis: int, index: Tensor, source: Tensor) -> Tensor:
    """aten.index_copy with an index that names no place twice, as one choice among both tensors.

    Engines read at places that a constant names faster than they write there, if they do.
    """
    places = torch.arange(x.shape[axis])
    chosen = places.unsqueeze(1) == index
    # Of a place that is written to, how far behind x what is written lies: the rest is zero.
    further = x.shape[axis] + torch.arange(index.shape[0]) - index
    order = places + torch.where(chosen, further, 0).sum(1)
    joined: Tensor = aten.index_select.default(torch.cat([x, source], axis), axis, order)
    return joined


def _whole(selected: tuple[Tensor, int, Tensor, Tensor]) -> Tensor:
    """The weight, through which no gradient passes to θ."""
    frozen, axis, index, theta = selected
    whole: Tensor = aten.index_copy.default(frozen, axis, index, theta.detach())
    return whole


def _with_gradient(
    y: Tensor,
    x: Tensor,
    channels: int,
    selected: tuple[Tensor, int, Tensor, Tensor],
    gradient: Gradient,
) -> Tensor:
    _, _, index, theta = selected
    result: Tensor = _Selected.apply(y, x.detach(), theta, index, channels, gradient)  # type: ignore[no-untyped-call]
    return result


class _Selected(torch.autograd.Function):
    """Hand a layer's result on; on the way back, compute the gradient of θ beside it."""

    @staticmethod
    def forward(
        ctx: Any,
        y: Tensor,
        x: Tensor,
        theta: Tensor,
        index: Tensor,
        channels: int,
        gradient: Gradient,
    ) -> Tensor:
        ctx.save_for_backward(x, index)
        ctx.channels, ctx.gradient = channels, gradient
        same: Tensor = aten.alias.default(y)
        return same

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, index = ctx.saved_tensors
        kept = aten.index_select.default(x, ctx.channels, index)
        return grad, None, ctx.gradient(grad, kept), None, None, None
