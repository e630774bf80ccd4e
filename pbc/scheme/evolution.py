"""The search for a choice within a budget where memory does not add up: by evolution."""

from __future__ import annotations

import random
from collections.abc import Callable

from pbc.scheme.problem import NONE, Choice, Problem

POPULATION = 32
GENERATIONS = 60
_MUTATED = 0.1


def evolve(
    problem: Problem, budget_bytes: int, measured: Callable[[Choice], int], seed: int
) -> Choice | None:
    """Return a choice of large value of which at most so many bytes are measured; None without.

    Lin et al., On-Device Training Under 256KB Memory, NeurIPS 2022, section 3.2, names the method
    and leaves it open: here the more valuable half of a population has children by uniform
    crossover and mutation, and what is beyond the bytes that add up gives up what is worth least of
    its bytes, and takes again what still fits. Measuring takes long, so only what would be the best
    so far is measured; by what it is beyond the budget, the bytes that may add up where a gradient
    goes as far are lowered.
    """
    search = _Search(problem, budget_bytes, random.Random(seed))
    found: Choice | None = None
    population: list[Choice] = []
    for _ in range(GENERATIONS):
        children = [search.child(population) for _ in range(POPULATION)]
        fitting = {c for c in (*population, *children) if c is not None and search.fits(c)}
        population = sorted(fitting, key=problem.value, reverse=True)[: POPULATION // 2]
        if not population:
            break
        leader = population[0]
        if found is not None and problem.value(leader) <= problem.value(found):
            continue
        beyond = measured(leader) - budget_bytes
        if beyond <= 0:
            found = leader
        else:
            search.reject(leader, beyond)
    return found


class _Search:
    """Makes choices whose bytes add up to at most so many, by how far a gradient goes."""

    def __init__(self, problem: Problem, most_bytes: int, chance: random.Random) -> None:
        self._problem = problem
        self._chance = chance
        self._most_bytes = [most_bytes] * len(problem.bases)

    def fits(self, choice: Choice) -> bool:
        return self._problem.size_bytes(choice) <= self._most_bytes[choice.biases]

    def reject(self, choice: Choice, beyond: int) -> None:
        """Lower what may add up, by at most half of what there is above the head alone."""
        size_bytes = self._problem.size_bytes(choice)
        half = (size_bytes + self._problem.bases[0].size_bytes) // 2
        most_bytes = max(size_bytes - beyond, half - (half == size_bytes))
        for biases in range(choice.biases, len(self._most_bytes)):
            self._most_bytes[biases] = min(self._most_bytes[biases], most_bytes)

    def child(self, population: list[Choice]) -> Choice | None:
        """Return a child of two, or something new; None where not even its biases fit."""
        chance, layers = self._chance, self._problem.layers
        if population and chance.random() < 0.9:
            one, other = chance.choice(population), chance.choice(population)
            biases = chance.choice([one.biases, other.biases])
            if chance.random() < _MUTATED:
                biases = chance.randrange(len(self._problem.bases))
            options = [
                chance.choice([_option(one, layer), _option(other, layer)])
                if chance.random() >= _MUTATED
                else chance.randrange(NONE, len(layers[layer]))
                for layer in range(biases)
            ]
        else:
            biases = chance.randrange(len(self._problem.bases))
            options = [chance.randrange(NONE, len(layers[layer])) for layer in range(biases)]
        return self._fitted(biases, options)

    def _fitted(self, biases: int, options: list[int]) -> Choice | None:
        left = self._most_bytes[biases] - self._problem.bases[biases].size_bytes
        if left < 0:
            return None
        left -= sum(self._bytes(layer, option) for layer, option in enumerate(options))
        while left < 0:
            held = [layer for layer, option in enumerate(options) if option != NONE]
            least = min(held, key=lambda layer: self._density(layer, options[layer]))
            left += self._bytes(least, options[least])
            options[least] = NONE
        # Whatever is worth most of its bytes first, while something fits.
        while True:
            gains = [
                (gain / max(more, 1), layer, option)
                for layer, held in enumerate(options)
                for option in range(len(self._problem.layers[layer]))
                if (gain := self._value(layer, option) - self._value(layer, held)) > 0
                and (more := self._bytes(layer, option) - self._bytes(layer, held)) <= left
            ]
            if not gains:
                return Choice(biases, tuple(options))
            _, layer, option = max(gains)
            left -= self._bytes(layer, option) - self._bytes(layer, options[layer])
            options[layer] = option

    def _bytes(self, layer: int, option: int) -> int:
        return 0 if option == NONE else self._problem.layers[layer][option].size_bytes

    def _value(self, layer: int, option: int) -> float:
        return 0.0 if option == NONE else self._problem.layers[layer][option].value

    def _density(self, layer: int, option: int) -> float:
        return self._value(layer, option) / max(self._bytes(layer, option), 1)


def _option(choice: Choice, layer: int) -> int:
    return choice.options[layer] if layer < choice.biases else NONE
