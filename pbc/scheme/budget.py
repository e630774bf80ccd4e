"""A budget of memory becomes a scheme: the most valuable one that is within it."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from torch import Tensor

from pbc.errors import PbcError, UsageError
from pbc.frontend.strategy import Decision
from pbc.frontend.traced_network import TracedNetwork
from pbc.ir.program import Program
from pbc.scheme.contributions import Contributions
from pbc.scheme.costs import Costs, everything, taken
from pbc.scheme.evolution import evolve
from pbc.scheme.knapsack import best
from pbc.scheme.layers import Layer, layers
from pbc.scheme.problem import NONE, Choice, Item, Problem
from pbc.scheme.scheme import Scheme
from pbc.util.progress import report
from pbc.util.sizes import memory_bytes, memory_text

_PEAK = "peak="
# What adds up is an estimate: how often it is corrected by what the memory model says of a scheme.
_CORRECTIONS = 4
# Of a budget; less than this is not worth another derivation.
_NEAR = 0.02


def is_budget(argument: str) -> bool:
    """Whether what is behind a strategy's colon is `8MiB` or `peak=64MiB`."""
    return memory_bytes(argument.removeprefix(_PEAK)) is not None


@dataclass(frozen=True)
class Budget:
    """The bytes that a scheme may take; of the peak, or of what training holds beside θ.

    name: what the strategy goes by.
    """

    name: str
    most_bytes: int
    of_peak: bool = False

    @classmethod
    def parse(cls, text: str) -> Budget:
        """Read `sparse:8MiB` or `sparse:peak=64MiB`."""
        name, _, argument = text.partition(":")
        most_bytes = memory_bytes(argument.removeprefix(_PEAK))
        if most_bytes is None:
            raise UsageError(f"strategy {text!r} needs a budget, such as {name}:8MiB")
        return cls(name, most_bytes, argument.startswith(_PEAK))

    def insert(self, network: TracedNetwork, example: Tensor) -> None:
        raise UsageError(f"{self} is a budget, of which `pbc compile` makes a scheme")

    def trainable(self, network: TracedNetwork) -> frozenset[str]:
        raise UsageError(f"{self} is a budget, of which `pbc compile` makes a scheme")

    def __str__(self) -> str:
        """Return the strategy as people write it."""
        return f"{self.name}:{_PEAK * self.of_peak}{memory_text(self.most_bytes)}"

    def decided(
        self,
        network: TracedNetwork,
        program: Callable[[str], Program],
        contributions: Path | None,
        seed: int,
    ) -> Decision:
        """Choose a scheme, and verify by the memory model that it is within the budget."""
        found = layers(network)
        known = None if contributions is None else Contributions.open(contributions)
        if self.of_peak and known is None:
            raise UsageError(f"{self} needs --contributions, which `pbc analyze` measures")
        report("choose-scheme", 0.0, "what each layer takes")
        costs = Costs.of(program(f"{self.name}:{everything(found)}"), found)
        problem = _problem(found, costs, known)

        @functools.cache
        def measured(choice: Choice) -> int:
            took = taken(program(f"{self.name}:{_scheme(choice, found)}"))
            return took["peak" if self.of_peak else "extra"]

        if self.of_peak:
            choice = evolve(problem, self.most_bytes, measured, seed)
        else:
            choice = _corrected(problem, self.most_bytes, measured, known is None)
        if choice is None:
            choice = Choice(0, ())
        if measured(choice) > self.most_bytes:
            raise PbcError(
                f"{self} is too little: the head alone takes {memory_text(measured(choice))}, by "
                "the memory model; a smaller --batch takes less"
            )
        return Decision(
            f"{self.name}:{_scheme(choice, found)}",
            f"{self}: {memory_text(measured(choice))} by the memory model, {_reason(known)}",
        )


def _corrected(
    problem: Problem, most_bytes: int, measured: Callable[[Choice], int], last_first: bool
) -> Choice | None:
    """The best choice that is measured to fit; at first, what adds up is held to be measured."""
    chosen: Choice | None = None
    limit, fitted = most_bytes, 0
    for number in range(_CORRECTIONS):
        report("choose-scheme", (number + 1) / (_CORRECTIONS + 1), "a scheme and what it takes")
        choice = _last_first(problem, limit) if last_first else best(problem, limit)
        if choice is None or choice == chosen:
            break
        left = most_bytes - measured(choice)
        if left >= 0 and limit > fitted:
            chosen, fitted = choice, limit
        if 0 <= left <= _NEAR * most_bytes:
            break
        limit += left
    return chosen


def _last_first(problem: Problem, most_bytes: int) -> Choice | None:
    """The last layers, each with as much of its weight as still fits."""
    head, *bases = problem.bases
    if head.size_bytes > most_bytes:
        return None
    spent, options = 0, list[int]()
    for base, layer in zip(bases, problem.layers, strict=True):
        left = most_bytes - spent - base.size_bytes
        if left < 0:
            break
        fitting = [number for number, item in enumerate(layer) if item.size_bytes <= left]
        options.append(fitting[-1] if fitting else NONE)
        spent += layer[fitting[-1]].size_bytes if fitting else 0
    return Choice(len(options), tuple(options))


def _problem(found: Sequence[Layer], costs: Costs, known: Contributions | None) -> Problem:
    """What can be chosen, the last layer first; without contributions nothing is worth anything."""
    bases = [
        Item(size_bytes, 0.0 if known is None else _of_biases(known, biases))
        for biases, size_bytes in enumerate(costs.bases)
    ]
    return Problem(
        bases,
        [
            [
                Item(costs.layers[layer.name][share], _value(known, layer, number))
                for number, share in enumerate(layer.fractions)
            ]
            for layer in reversed(found)
        ],
    )


def _of_biases(known: Contributions, count: int) -> float:
    """What those of the last layers are worth: on a line between the numbers that were measured."""
    counts = [0, *sorted(known.biases)]
    values = [0.0, *(known.biases[measured] for measured in counts[1:])]
    return float(np.interp(count, counts, values))


def _value(known: Contributions | None, layer: Layer, number: int) -> float:
    share = layer.fractions[number]
    return 0.0 if known is None else known.layers.get(layer.name, {}).get(share, 0.0)


def _scheme(choice: Choice, found: Sequence[Layer]) -> Scheme:
    chosen = {
        layer.name: layer.fractions[option]
        for layer, option in zip(reversed(found), choice.options, strict=False)
        if option != NONE
    }
    return Scheme(choice.biases, dict(reversed(chosen.items())))


def _reason(known: Contributions | None) -> str:
    if known is None:
        return "the last layers first; `pbc analyze` measures which ones matter"
    return f"chosen by contributions ({known.measure})"
