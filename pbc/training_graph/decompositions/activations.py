"""Gradients of activation functions.

By factors of 0 and 1: engines vectorise a comparison and a product, and select one by one.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor
from torch._decomp import core_aten_decompositions

aten = torch.ops.aten


_selects: ContextVar[bool] = ContextVar("pbc_selects", default=False)


@contextmanager
def selecting() -> Iterator[None]:
    """Have gradients inside the block be zero where a ReLU was off, even infinite ones.

    A root behind a ReLU has those, and zero times infinity is not a number.
    """
    token = _selects.set(True)
    try:
        yield
    finally:
        _selects.reset(token)


def threshold_backward(grad: Tensor, x: Tensor, threshold: float) -> Tensor:
    """Let through what was above the threshold; for a ReLU `x` is its result."""
    above = x > threshold
    if _selects.get():
        return torch.where(above, grad, 0.0)
    return grad * above.to(grad.dtype)


def hardsigmoid_backward(grad: Tensor, x: Tensor) -> Tensor:
    """One sixth between -3 and 3."""
    return grad * (_between(x) * (1 / 6))


def hardswish_backward(grad: Tensor, x: Tensor) -> Tensor:
    """Differentiate x · hardsigmoid(x) as a product."""
    share: Tensor = aten.hardsigmoid.default(x)
    return grad * (share + x * (_between(x) * (1 / 6)))


def _between(x: Tensor) -> Tensor:
    """1 where -3 < x < 3, else 0."""
    return (x.abs() < 3).to(x.dtype)


def gelu_backward(grad: Tensor, x: Tensor, approximate: str = "none") -> Tensor:
    """Differentiate x · Φ(x): with u = x/√2, that is (1 + erf u)/2 + u · exp(-u²)/√π."""
    if approximate != "none":
        by_tanh: Tensor = core_aten_decompositions()[aten.gelu_backward.default](
            grad, x, approximate=approximate
        )
        return by_tanh
    u = x * math.sqrt(0.5)
    # The factor 1/√π as a term of the exponent, that one subtraction serves the sign as well.
    factor: Tensor = aten.scalar_tensor.default(-0.5 * math.log(math.pi), dtype=x.dtype)
    slope = u.erf() * 0.5 + u * (factor - u * u).exp() + 0.5
    return grad * slope
