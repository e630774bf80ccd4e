"""The search beside the exact choice, where memory adds up, and where it does not."""

from __future__ import annotations

import random

from hypothesis import given, settings
from hypothesis import strategies as st

from pbc.scheme.evolution import evolve
from pbc.scheme.knapsack import best
from pbc.scheme.problem import Choice, Item, Problem


def network(seed: int, count: int = 24) -> Problem:
    """Layers as of a network: four shares each, which bring less and less."""
    chance = random.Random(seed)
    bases, layers = [Item(100, 0.0)], []
    for _ in range(count):
        size, value = bases[-1]
        bases.append(Item(size + chance.randrange(40), value + chance.uniform(-0.1, 0.3)))
        size, value = chance.randrange(8, 400), chance.uniform(-0.2, 3.0)
        layers.append([Item(size * k // 8, value * (k / 8) ** 0.5) for k in (1, 2, 4, 8)])
    return Problem(bases, layers)


@settings(deadline=None, max_examples=25)
@given(st.integers(0, 2**20), st.integers(150, 4000))
def test_on_memory_that_adds_up_it_comes_near_the_best_and_not_beyond(
    seed: int, budget: int
) -> None:
    problem = network(seed)
    exact, found = best(problem, budget), evolve(problem, budget, problem.size_bytes, seed)
    assert exact is not None
    assert found is not None
    assert problem.size_bytes(found) <= budget
    most = problem.value(exact)
    assert 0.99 * most - 1e-9 <= problem.value(found) <= most + 1e-9


def test_what_is_measured_counts() -> None:
    problem, asked = network(0), list[Choice]()

    def measured(choice: Choice) -> int:
        asked.append(choice)
        return problem.size_bytes(choice) + 500 + 7 * choice.biases

    found = evolve(problem, 2000, measured, seed=0)
    assert found is not None
    assert measured(found) <= 2000
    assert len(asked) < 20
    assert problem.value(found) > 0.9 * problem.value(best(problem, 1300) or Choice(0, ()))


def test_what_fits_nowhere_is_not_found() -> None:
    assert evolve(Problem([Item(3, 0.0)], []), 2, lambda choice: 3, seed=0) is None
