"""Head2Toe and side networks: what they read, how they start, that all else is a prefix."""

from __future__ import annotations

import pytest
import torch
from networks import AttentionNet, ChannelsLastNet, Kind, ResidualNet, captured, settled, split
from torch import Tensor, nn

from pbc.errors import PbcError
from pbc.frontend import taps
from pbc.ir.graph import op_name
from pbc.testing import (
    assert_gradients,
    eager_gradients,
    gradients,
    make_program,
)

KINDS: list[Kind] = [ResidualNet, ChannelsLastNet, AttentionNet]
STRATEGIES = ["head2toe", "side:4"]


class TwoHeads(ResidualNet):
    """The mean of two heads, as of distilled transformers."""

    def __init__(self) -> None:
        super().__init__()
        self.other = nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks(self.stem(x)).mean((2, 3))
        logits: Tensor = (self.fc(x) + self.other(x)) / 2
        return logits


class Backbone(nn.Module):
    """Without a classifier; it puts out a map."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, 2, 1)
        self.blocks = nn.Sequential(*ResidualNet().blocks)

    def forward(self, x: Tensor) -> Tensor:
        features: Tensor = self.blocks(self.stem(x)) * 0.5
        return features


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("kind", KINDS)
def test_the_model_starts_unchanged_and_trains_as_in_torch(kind: Kind, strategy: str) -> None:
    module, program = captured(kind, strategy)
    with torch.no_grad():
        untouched = settled(kind())(program.network.example)
        torch.testing.assert_close(module(program.network.example), untouched)
    marked = split(kind, strategy)
    assert_gradients(gradients(marked), eager_gradients(module, marked), tolerance=2e-3)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_everything_but_vectors_is_a_frozen_prefix(strategy: str) -> None:
    level = split(ResidualNet, strategy).levels[0]
    assert level.prefix is not None
    assert not [n for n in level.body.graph.nodes if "conv" in op_name(n)]
    sent = [node.meta["val"].shape[1:] for node in _outputs(level.prefix)]
    # Two blocks of sixteen channels; the last one's mean is what the head reads anyway.
    assert sum(size.numel() for size in sent) == 3 * 16


def test_a_head_reads_the_means_of_blocks_scaled() -> None:
    module, program = captured(ResidualNet, "head2toe")
    fc = module.get_submodule("fc")
    assert program.network.head.parameters == {"fc.weight": 48, "fc.bias": 48}
    plain, x = settled(ResidualNet()), program.network.example
    maps, expected = plain.get_submodule("stem")(x), []
    for block in plain.get_submodule("blocks").children():
        maps = block(maps)
        expected.append(maps.mean((2, 3)))
    expected[:2] = [e / e.pow(2).mean(1, keepdim=True).sqrt() for e in expected[:2]]
    read: list[Tensor] = []
    handle = fc.register_forward_hook(lambda layer, inputs, y: read.append(inputs[0]))
    with torch.no_grad():
        module(x)
    handle.remove()
    torch.testing.assert_close(read[0], torch.cat([expected[2], *expected[:2]], 1))


def test_neighbours_of_a_width_are_left_out_where_all_are_too_many(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(taps, "MOST", 20)
    program = make_program(settled(ResidualNet()), "head2toe")
    assert program.network.head.parameters["fc.weight"] == 32


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_backbone_without_a_classifier_gets_one(strategy: str) -> None:
    module = settled(Backbone())
    program = make_program(module, strategy)
    width = 64 if strategy == "head2toe" else 16
    assert set(program.network.head.parameters.values()) == {width}


def test_a_block_may_return_more_than_a_tensor() -> None:
    class Paired(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = ResidualNet().get_submodule("blocks.0")

        def forward(self, pair: tuple[Tensor, str]) -> tuple[Tensor, str]:
            return self.inner(pair[0]), pair[1]

    class Pairs(ResidualNet):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.Sequential(*[Paired() for _ in range(3)])

        def forward(self, x: Tensor) -> Tensor:
            logits: Tensor = self.fc(self.blocks((self.stem(x), ""))[0].mean((2, 3)))
            return logits

    program = make_program(settled(Pairs()), "head2toe")
    assert program.network.head.parameters["fc.weight"] == 48


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_two_heads_are_refused_by_name(strategy: str) -> None:
    with pytest.raises(PbcError, match=r"the head of TwoHeads \(fc.weight.*not one linear layer"):
        make_program(settled(TwoHeads()), strategy)


def test_a_network_of_one_block_has_nothing_to_read() -> None:
    layers = nn.Conv2d(3, 8, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 10)
    network = nn.Sequential(*layers)
    with pytest.raises(PbcError, match="no block beside its last"):
        make_program(settled(network), "head2toe")


def _outputs(graph: torch.fx.GraphModule) -> list[torch.fx.Node]:
    (output,) = [node for node in graph.graph.nodes if node.op == "output"]
    return list(output.all_input_nodes)
