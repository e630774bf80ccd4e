"""A head that no rule of operators knows: parameters of which each row moves one score alone."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from pbc.frontend.agreement import only_requiring
from pbc.frontend.gradient_stops import without_checkpoints
from pbc.frontend.head import Found
from pbc.ir.program import Head

_IMAGES = 8
# So many scores are looked at, the largest of some image among them.
_SCORES = 4


def head_by_gradients(module: nn.Module, example: Tensor) -> Found | None:
    """Look for parameters whose row i moves score i, of any image, and no other score.

    That is what a classifier's weight is, whatever is done with its scores afterwards: the largest
    of positions, a mixture of experts, a query for each class. Layers before it move all scores.
    example: [batch, channels, height, width]; the values do not matter. None where there is no
    such parameter of two axes, or the scores are not one tensor [batch, classes].
    """
    random = torch.Generator().manual_seed(_IMAGES)
    images = torch.randn(_IMAGES, *example.shape[1:], generator=random)
    parameters = dict(module.named_parameters())
    with only_requiring(module, parameters), torch.enable_grad(), without_checkpoints():
        scores = module.eval()(images)
        if not isinstance(scores, Tensor) or scores.dim() != 2 or not scores.requires_grad:
            return None
        classes = scores.shape[1]
        rows = {name: p for name, p in parameters.items() if p.dim() and len(p) == classes}
        moved: set[str] = set()
        largest = scores.argmax(1).tolist()
        for row in list(dict.fromkeys([*largest, 0]))[:_SCORES]:
            if not rows:
                return None
            total = scores[:, row].sum()
            try:
                gradients = torch.autograd.grad(
                    total, list(rows.values()), retain_graph=True, allow_unused=True
                )
            except RuntimeError:  # torch has no derivative of some operator on the way
                return None
            for name, gradient in zip(list(rows), gradients, strict=True):
                others = gradient is not None and bool(
                    gradient[:row].any() or gradient[row + 1 :].any()
                )
                if others:
                    del rows[name]
                elif gradient is not None and bool(gradient[row].any()):
                    moved.add(name)
    found = {name: p for name, p in rows.items() if name in moved}
    widths = [math.prod(p.shape[1:]) for p in found.values() if p.dim() > 1]
    if not widths:
        return None
    head = {name: math.prod(p.shape[1:]) if p.dim() > 1 else widths[0] for name, p in found.items()}
    return Found(Head(head), classes)
