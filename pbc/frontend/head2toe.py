"""Head2Toe: a head that reads every block of a frozen network."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from pbc.frontend.strategy import without_argument
from pbc.frontend.taps import Taps
from pbc.frontend.traced_network import TracedNetwork


@dataclass(frozen=True)
class Head2Toe:
    """Train a head that reads, beside its own input, the pooled output of every block.

    Evci et al., Head2Toe, ICML 2022, section 3. Everything but the head is a frozen prefix, so
    that a device keeps one vector an image. The model starts unchanged: what a head has for blocks
    is zero until it is drawn for other classes. Deviations: blocks are read, not every layer, each
    averaged over all its positions; a group of features has a root mean square of one instead of a
    norm of one, which is the size of what heads read; no feature is selected by group lasso, since
    the closed form shrinks instead; where all blocks are too many, some are left out
    (pbc.frontend.taps).
    """

    @classmethod
    def parse(cls, text: str) -> Head2Toe:
        without_argument(text)
        return cls()

    def insert(self, network: TracedNetwork, example: Tensor) -> None:
        taps = Taps.of(network, "head2toe")
        _widen(taps.head, taps.width)
        taps.connect(network, lambda layer, x, tapped: torch.cat([x, tapped], 1))

    def trainable(self, network: TracedNetwork) -> frozenset[str]:
        return frozenset()


def _widen(layer: nn.Linear, more: int) -> None:
    """Give a layer so many inputs more, that count for nothing."""
    old = layer.weight
    layer.weight = nn.Parameter(torch.cat([old.detach(), old.new_zeros(len(old), more)], 1))
    layer.in_features += more
