"""The elastic selector beside brute force over all subsets."""

from __future__ import annotations

import itertools
import time

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from pbc.runtime.selectors import Candidates
from pbc.runtime.selectors.elastic import Elastic


@st.composite
def problems(draw: st.DrawFn) -> tuple[Candidates, int]:
    count = draw(st.integers(1, 9))
    times = st.lists(st.integers(0, 12), min_size=count, max_size=count)
    values = st.lists(st.integers(-5, 30), min_size=count, max_size=count)
    names = tuple(f"t{number}" for number in range(count))
    importance = np.array(draw(values), float)
    own = np.array(draw(times), float)
    passing = np.cumsum(draw(times)).astype(float)
    return Candidates(names, importance, own, passing), draw(st.integers(1, 80))


def time_of(candidates: Candidates, chosen: tuple[str, ...]) -> float:
    places = [candidates.names.index(name) for name in chosen]
    return float(candidates.own_ms[places].sum() + candidates.passing_ms[max(places)])


def value_of(candidates: Candidates, chosen: tuple[str, ...]) -> float:
    return float(sum(candidates.importance[candidates.names.index(name)] for name in chosen))


@settings(max_examples=300, deadline=None)
@given(problems())
def test_it_is_the_best_of_all_subsets(problem: tuple[Candidates, int]) -> None:
    candidates, budget = problem
    chosen = Elastic(units=budget).choose(candidates, float(budget))
    subsets = (
        subset
        for size in range(1, len(candidates.names) + 1)
        for subset in itertools.combinations(candidates.names, size)
        if time_of(candidates, subset) <= budget
    )
    best = max((value_of(candidates, subset) for subset in subsets), default=0.0)
    assert value_of(candidates, chosen) == max(best, 0.0)
    assert not chosen or time_of(candidates, chosen) <= budget


@settings(max_examples=50, deadline=None)
@given(problems(), st.floats(0.1, 40))
def test_rounding_goes_beyond_no_budget(problem: tuple[Candidates, int], budget: float) -> None:
    candidates, _ = problem
    chosen = Elastic(units=97).choose(candidates, budget)
    assert not chosen or time_of(candidates, chosen) <= budget * (1 + 1e-6)


def test_the_tensors_of_a_transformer_take_less_than_a_second() -> None:
    generator = np.random.default_rng(0)
    count = 152  # of ViT-B/16
    candidates = Candidates(
        tuple(map(str, range(count))),
        generator.normal(size=count),
        generator.uniform(0, 5, count),
        np.cumsum(generator.uniform(0, 3, count)),
    )
    start = time.process_time()
    assert Elastic().choose(candidates, 300.0)
    assert time.process_time() - start < 1
