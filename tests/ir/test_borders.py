from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional

from pbc.ir import borders

aten = torch.ops.aten


@settings(deadline=None)
@given(
    mode=st.sampled_from(["circular", "reflect", "replicate"]),
    sizes=st.lists(st.integers(-1, 3), min_size=4, max_size=4),
)
def test_a_border_and_its_gradient_are_torch_s(mode: str, sizes: list[int]) -> None:
    values = torch.arange(2.0 * 3 * 4 * 5).reshape(2, 3, 4, 5).sin()
    x, other = values.clone().requires_grad_(), values.clone().requires_grad_()
    if mode == "circular":
        sizes = [max(size, 0) for size in sizes]
    found, expected = borders.bordered(x, sizes, mode), functional.pad(other, sizes, mode)
    assert torch.equal(found, expected)
    found.cos().sum().backward()
    expected.cos().sum().backward()
    torch.testing.assert_close(x.grad, other.grad)


@pytest.mark.parametrize("operator", borders.TABLE)
def test_each_operator_is_replaced_by_one_of_its_arguments(operator: torch._ops.OpOverload) -> None:
    axes = next((n for n in (1, 2, 3) if f"{n}d" in str(operator)), 2)
    x = torch.randn(2, 3, *[4] * axes)
    arguments = ([1, 2] * axes, *(("circular",) if operator is aten.pad.default else ()))
    assert torch.equal(borders.TABLE[operator](x, *arguments), operator(x, *arguments))


def test_a_constant_border_stays_one_operator() -> None:
    x = torch.randn(1, 2, 3, 3)
    assert torch.equal(borders.pad(x, [1, 0, 2, 1]), functional.pad(x, [1, 0, 2, 1]))
    assert torch.equal(borders.pad(x, [1, 1], value=2.0), functional.pad(x, [1, 1], value=2.0))
