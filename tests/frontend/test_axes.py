from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from networks import ChannelsLastNet, ResidualNet
from torch import Tensor, nn

from pbc.data import InputSpec
from pbc.frontend import models
from pbc.frontend.axes import channel_axis
from pbc.frontend.strategy import Adapters
from pbc.frontend.trace import trace
from pbc.frontend.traced_network import TracedNetwork
from pbc.ir.program import Head

SPEC = InputSpec((3, 16, 16), models.IMAGENET_MEAN, models.IMAGENET_STD)


class Features(nn.Module):
    """What a function makes of the maps of a convolution, 8 channels and 8×8 positions."""

    def __init__(self, then: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.then = then
        self.stem = nn.Conv2d(3, 8, 2, 2)
        self.norm = nn.LayerNorm(8)

    def forward(self, x: Tensor) -> Tensor:
        return self.then(self.stem(x))


@pytest.mark.parametrize(
    ("then", "axis"),
    [
        (lambda x: x.relu(), 1),
        (lambda x: x.permute(0, 2, 3, 1), 3),
        (lambda x: x.permute(0, 2, 3, 1) + x.permute(0, 2, 3, 1).relu(), 3),
        (lambda x: torch.cat([x.movedim(1, 3), x.movedim(1, 3)], 3), 3),
        (lambda x: torch.cat([x, x], 1), 1),
        (lambda x: x.permute(0, 2, 1, 3), 2),
        (lambda x: x.flatten(2).transpose(1, 2), 2),
        (lambda x: x.flatten(2), 1),
        (lambda x: nn.functional.layer_norm(x.movedim(1, 3), (8,)).movedim(3, 1), 1),
        (lambda x: x.mean((2, 3)), 1),
    ],
)
def test_the_channels_of_what_layers_make(then: Callable[[Tensor], Tensor], axis: int) -> None:
    result = trace(Features(then), torch.randn(2, 3, 16, 16)).result
    assert result is not None
    assert channel_axis(result) == axis


def test_a_head_is_added_on_channels_wherever_they_are() -> None:
    source = models.given(Features(lambda x: x.permute(0, 2, 3, 1)), "net", SPEC)
    assert source.head == Head({"head.weight": 8, "head.bias": 8})
    (note,) = source.notes
    assert note.endswith("on its 8 channels, averaged over positions")
    images = torch.randn(2, 3, 16, 16)
    module = source.module
    features = module.get_submodule("stem")(images).mean((2, 3))
    added = module.get_submodule("head")
    assert isinstance(added, nn.Linear)
    scores = nn.functional.linear(features, added.weight, added.bias)
    torch.testing.assert_close(module(images), scores)


def test_what_is_added_to_a_sequence_runs_once() -> None:
    block = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.ReLU())
    backbone = nn.Sequential(nn.Conv2d(3, 8, 2, 2), block)
    images = torch.randn(2, 3, 16, 16)
    features = backbone(images)
    source = models.given(backbone, "net", SPEC)
    module, added = source.module, source.module.get_submodule("head")
    assert isinstance(added, nn.Linear)
    scores = nn.functional.linear(features.mean((2, 3)), added.weight, added.bias)
    torch.testing.assert_close(module(images), scores)

    network = TracedNetwork.of(module, source.head, images, "1")
    Adapters(1).insert(network, images)
    adapter = module.get_submodule("1.adapter")
    nn.init.normal_(adapter.get_parameter("up.weight"))
    added_once = nn.functional.linear(adapter(features).mean((2, 3)), added.weight, added.bias)
    torch.testing.assert_close(module(images), added_once)


@pytest.mark.parametrize(
    ("kind", "layer"), [(ChannelsLastNet, nn.Linear), (ResidualNet, nn.Conv2d)]
)
def test_adapters_bottleneck_channels_and_not_rows(kind: type, layer: type) -> None:
    module, example = kind(), torch.randn(2, 3, 16, 16)
    head = Head({"fc.weight": 16, "fc.bias": 16})
    Adapters(1).insert(TracedNetwork.of(module, head, example), example)
    assert isinstance(module.get_submodule("blocks.2.adapter.down"), layer)
    assert tuple(module.get_parameter("blocks.2.adapter.down.weight").shape[:2]) == (8, 16)
