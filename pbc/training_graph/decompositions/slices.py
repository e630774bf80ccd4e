"""Parts of a tensor, whose gradients are put together again without writing into memory."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

aten = torch.ops.aten


def unbind(x: Tensor, axis: int) -> tuple[Tensor, ...]:
    """Take a tensor apart along an axis; the gradients are put together again, in one copy.

    torch's own spreads the gradient of each part over zeros of the whole, and adds those up.
    """
    parts: tuple[Tensor, ...] = _Unbind.apply(x, axis)  # type: ignore[no-untyped-call]
    return parts


class _Unbind(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: int) -> tuple[Tensor, ...]:
        ctx.axis = axis
        return tuple(aten.select.int(x, axis, index) for index in range(x.shape[axis]))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return torch.stack(grads, ctx.axis), None


def diagonal(x: Tensor, offset: int = 0, first: int = 0, second: int = 1) -> Tensor:
    """aten.diagonal as what is left of each row; the gradient selects likewise."""
    x = x.movedim((first, second), (-2, -1))
    above, left = max(0, -offset), max(0, offset)
    count = max(0, min(x.shape[-2] - above, x.shape[-1] - left))
    x = x.narrow(-2, above, count).narrow(-1, left, count)
    places = torch.arange(count)
    return torch.where(places == places[:, None], x, 0.0).sum(-1)
