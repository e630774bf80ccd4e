"""Linear layers as products of matrices."""

from __future__ import annotations

import torch
from torch import Tensor

aten = torch.ops.aten


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """aten.linear as one matrix product over all leading axes.

    torch's own broadcasts the weight over the batch for inputs of three axes, and engines then
    make the copies.
    """
    rows = x.reshape(-1, x.shape[-1]) if x.dim() != 2 else x
    product = rows @ weight.t() if bias is None else aten.addmm.default(bias, rows, weight.t())
    return product.reshape(*x.shape[:-1], weight.shape[0]) if x.dim() != 2 else product
