"""Attention as products and a softmax, with a backward that recomputes its weights."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

aten = torch.ops.aten


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
    if mask is not None and mask.dtype == torch.bool:
        mask = torch.where(mask, 0.0, -math.inf)
    alike = query.shape[:-2] == key.shape[:-2] == value.shape[:-2]
    if not alike or (mask is not None and mask.requires_grad):
        return _attention_weights(query * factor, key, mask) @ value
    attended: Tensor = _Attention.apply(query * factor, key, value, mask)  # type: ignore[no-untyped-call]
    return attended


def _attention_weights(query: Tensor, key: Tensor, mask: Tensor | None) -> Tensor:
    scores = query @ key.transpose(-1, -2)
    return torch.softmax(scores if mask is None else scores + mask, -1)


class _Attention(torch.autograd.Function):
    """Attention whose backward recomputes the weights instead of keeping [tokens, tokens].

    Dao et al., FlashAttention (NeurIPS 2022): what a query's scores share of the softmax's
    gradient is the product of its result and that result's gradient.
    """

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        attended = _attention_weights(query, key, mask) @ value
        ctx.save_for_backward(query, key, value, mask, attended)
        return attended

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grads
        query, key, value, mask, attended = ctx.saved_tensors
        weights = _attention_weights(query, key, mask)
        shared = (grad * attended).sum(-1, keepdim=True)
        grad_scores = weights * (grad @ value.transpose(-1, -2) - shared)
        return (
            grad_scores @ key,
            grad_scores.transpose(-1, -2) @ query,
            weights.transpose(-1, -2) @ grad,
            None,
        )
