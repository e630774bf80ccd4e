from __future__ import annotations

import pytest
import torch
from networks import AttentionNet, ChannelsLastNet, ConvNet, Kind, ResidualNet, split
from torch import Tensor

from pbc.proxies.fidelity import UpToInterface, interface_channels, standards


@pytest.mark.parametrize(
    ("kind", "strategy", "channels"),
    [
        (ConvNet, "linear-probe", (1,)),
        (ResidualNet, "last-k:1", (1,)),
        (ChannelsLastNet, "last-k:1", (3,)),
        (AttentionNet, "norm", (2,)),
    ],
)
def test_channels_are_where_the_network_has_them(
    kind: Kind, strategy: str, channels: tuple[int, ...]
) -> None:
    assert interface_channels(split(kind, strategy))[0] == channels


def test_statistics_are_of_channels_and_not_of_rows() -> None:
    program = split(ChannelsLastNet, "last-k:1")
    images = torch.randn(6, 3, 16, 16)
    level = UpToInterface(program, program.levels[0])
    (standard, *_) = standards(program, (level(part) for part in images.split(2)))
    with torch.no_grad():
        (sent, *_) = level(images)
    assert sent.shape == (6, 4, 4, 16)

    def per_channel(value: Tensor) -> Tensor:
        return value.reshape(1, 1, 1, 16)

    torch.testing.assert_close(standard.mean, per_channel(sent.mean((0, 1, 2))))
    spread = sent.flatten(0, 2).std(0, correction=0)
    torch.testing.assert_close(standard.std, per_channel(spread))
