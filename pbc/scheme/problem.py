"""The choice of a scheme within a budget: what can be chosen, what it takes, what it is worth."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

NONE = -1
"""In place of an option: nothing of a layer's weight trains."""


class Item(NamedTuple):
    """One thing to choose: bytes of memory, and its worth."""

    size_bytes: int
    value: float


class Choice(NamedTuple):
    """biases: of how many last layers. options: one for each of these, the last layer first."""

    biases: int
    options: tuple[int, ...]


@dataclass(frozen=True)
class Problem:
    """Of the last k layers biases train, and of each of these one share of its weight at most.

    bases: for k = 0, 1, … what the biases of the last k layers take, with all that a gradient
    needs on its way there. layers: the shares of the last layer's weight, of the one before it and
    so on, beside that.
    """

    bases: Sequence[Item]
    layers: Sequence[Sequence[Item]]

    def items(self, choice: Choice) -> list[Item]:
        """Return what is chosen."""
        chosen = zip(self.layers, choice.options, strict=False)
        return [
            self.bases[choice.biases],
            *(options[option] for options, option in chosen if option != NONE),
        ]

    def size_bytes(self, choice: Choice) -> int:
        return sum(item.size_bytes for item in self.items(choice))

    def value(self, choice: Choice) -> float:
        return sum(item.value for item in self.items(choice))
