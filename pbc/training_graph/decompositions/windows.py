"""Windows along an axis: the gradient of values that several windows hold."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

aten = torch.ops.aten


def unfold_backward(
    grad: Tensor, input_sizes: Sequence[int], axis: int, size: int, step: int
) -> Tensor:
    """Add up windows [..., windows, ..., size] where they were: copies, each a step further on.

    A window falls into parts of a step; the parts of one number lie end to end along the axis.
    """
    axis %= len(input_sizes)
    whole, windows = input_sizes[axis], grad.shape[axis]
    grad = grad.movedim(-1, axis + 1)
    behind = [0, 0] * (len(input_sizes) - axis - 1)
    total: Tensor | None = None
    for start in range(0, size, step):
        part = grad.narrow(axis + 1, start, min(step, size - start))
        if part.shape[axis + 1] < step:
            part = aten.constant_pad_nd.default(part, [*behind, 0, step - part.shape[axis + 1]])
        part = part.flatten(axis, axis + 1)
        # Beyond the end lies what the last, smaller part was filled up with.
        part = part.narrow(axis, 0, min(windows * step, whole - start))
        after = whole - start - part.shape[axis]
        if start or after:
            part = aten.constant_pad_nd.default(part, [*behind, start, after])
        total = part if total is None else total + part
    assert total is not None
    return total
