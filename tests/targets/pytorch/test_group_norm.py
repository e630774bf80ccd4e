"""A group norm as the first layer that trains: torch's own gradient of it may end the process."""

from __future__ import annotations

import torch
from torch.nn import functional

from pbc.runtime.engines.pytorch.resolved_graph import _function


def test_the_scale_of_a_norm_of_channels_last_features_trains() -> None:
    features = torch.randn(4, 512, 2, 2)
    scale, shift = torch.ones(512, requires_grad=True), torch.zeros(512, requires_grad=True)
    last = features.to(memory_format=torch.channels_last)
    found = _function("aten.group_norm.default")(last, 1, scale, shift)
    expected = functional.group_norm(features, 1, scale, shift)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(
        torch.autograd.grad(found.square().sum(), scale),
        torch.autograd.grad(expected.square().sum(), scale),
    )
