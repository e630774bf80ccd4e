"""The exact choice beside brute force."""

from __future__ import annotations

import itertools

from hypothesis import given, settings
from hypothesis import strategies as st

from pbc.scheme.knapsack import best
from pbc.scheme.problem import NONE, Choice, Item, Problem

ITEMS = st.builds(Item, st.integers(0, 30), st.integers(-4, 20).map(float))


@st.composite
def problems(draw: st.DrawFn, most: int = 5) -> Problem:
    layers = draw(st.lists(st.lists(ITEMS, max_size=3), max_size=most))
    sizes = sorted(draw(st.lists(st.integers(0, 40), min_size=len(layers), max_size=len(layers))))
    bases = [Item(2 + size, float(draw(st.integers(-5, 10)))) for size in sizes]
    return Problem([Item(2, 0.0), *bases], layers)


def every(problem: Problem) -> list[Choice]:
    return [
        Choice(biases, options)
        for biases in range(len(problem.bases))
        for options in itertools.product(
            *(range(NONE, len(layer)) for layer in problem.layers[:biases])
        )
    ]


@settings(deadline=None, max_examples=200)
@given(problems(), st.integers(0, 120))
def test_no_choice_within_the_budget_is_worth_more(problem: Problem, budget: int) -> None:
    fitting = [c for c in every(problem) if problem.size_bytes(c) <= budget]
    found = best(problem, budget)
    if not fitting:
        assert found is None
        return
    assert found is not None
    assert problem.size_bytes(found) <= budget
    assert problem.value(found) == max(map(problem.value, fitting))


def test_layers_train_only_where_a_gradient_comes_to() -> None:
    layers = [[Item(1, 1.0)], [Item(1, 5.0)]]
    problem = Problem([Item(0, 0.0), Item(2, 0.5), Item(9, 0.5)], layers)
    assert best(problem, 8) == Choice(1, (0,))
    assert best(problem, 10) == Choice(2, (NONE, 0))
    assert best(Problem([Item(3, 0.0)], []), 2) is None
