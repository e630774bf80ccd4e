"""Ladder side tuning: a small network beside a frozen one, which nothing is passed back through."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from pbc.frontend.strategy import inserted, whole_number
from pbc.frontend.taps import Taps, scaled
from pbc.frontend.traced_network import TracedNetwork

_LEAST_WIDTH = 8


@dataclass(frozen=True)
class Side:
    """Train a network of a K-th of the width beside the frozen one, and the head.

    Sung et al., LST: Ladder Side-Tuning, NeurIPS 2022, section 3.2: each of its layers reads a
    mix of the one before and of what a block of the frozen network puts out, brought to its width,
    and its last is brought to the head's width and added. Everything else is a frozen prefix.
    Deviations: blocks are read pooled over their positions, so that a device can keep them, and
    the side network is of linear layers, which read what is scaled; it starts anew and not of
    pruned weights; its last layer starts at zero, so that the model starts unchanged.
    """

    reduction: int

    @classmethod
    def parse(cls, text: str) -> Side:
        return cls(whole_number(text, "K"))

    def insert(self, network: TracedNetwork, example: Tensor) -> None:
        taps = Taps.of(network, "side")
        widths = [tap.width for tap in taps.taps]
        taps.head.add_module("side", Ladder(widths, taps.head.in_features, self.reduction))
        taps.connect(network, lambda layer, x, tapped: x + layer.get_submodule("side")(tapped))

    def trainable(self, network: TracedNetwork) -> frozenset[str]:
        return inserted(network, Ladder)


class Ladder(nn.Module):
    """From what blocks put out, f32[b, sum(widths)], to what is added to the head's input."""

    def __init__(self, widths: Sequence[int], out: int, reduction: int) -> None:
        super().__init__()
        self.widths = list(widths)
        width = max(_LEAST_WIDTH, out // reduction)
        self.down = nn.ModuleList(nn.Linear(given, width) for given in widths)
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in widths)
        # A gate's sigmoid is the share of the layer before (section 3.2: it starts at a half).
        self.gates = nn.ParameterList(nn.Parameter(torch.zeros(1)) for _ in widths[1:])
        self.up = nn.Linear(width, out)
        nn.init.zeros_(self.up.weight)
        nn.init.zeros_(self.up.bias)

    def forward(self, tapped: Tensor) -> Tensor:
        state: Tensor | None = None
        parts = tapped.split(self.widths, 1)
        for number, (part, down, layer) in enumerate(
            zip(parts, self.down, self.layers, strict=True)
        ):
            read = down(part)
            if state is not None:
                share = torch.sigmoid(self.gates[number - 1])
                read = read + share * (state - read)
            state = read + torch.relu(layer(scaled(read)))
        assert state is not None, "there is a tap"
        # Of a norm of one: a head's usual learning rate is too high for a layer that reads more.
        up: Tensor = self.up(scaled(state) * self.up.in_features**-0.5)
        return up
