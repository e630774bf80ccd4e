from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pbc.proxies.use import LEAST_SAVED, used
from pbc.runtime.routing.outlook import BOUNDS

SHARES = (0.25, 0.5, 0.75, 1.0)


def losing(*points: float) -> list[tuple[float, float]]:
    return list(zip(SHARES, points, strict=True))


def test_each_bound_takes_the_level_that_makes_a_run_shortest() -> None:
    faithful, cheap = losing(0.1, 0.2, 0.3, 0.4), losing(0.4, 0.8, 1.2, 1.6)
    # Within half a point all run at 0.6, or a third at 0.3; within two points all at 0.3.
    assert used([0.6, 0.3], [[faithful, cheap]]) == {0, 1}
    assert used([0.6, 0.3], [[faithful, faithful]]) == {1}


def test_what_never_keeps_a_bound_or_saves_next_to_nothing_is_not_used() -> None:
    ruinous = losing(20, 40, 50, 60)
    assert used([0.3], [[ruinous]]) == set()
    assert used([1 - LEAST_SAVED / 2], [[losing(0, 0, 0, 0)]]) == set()
    assert used([1.2], [[losing(0, 0, 0, 0)]]) == set()  # lowered, it turned out slower
    assert used([], [[]]) == set()


def test_one_kind_of_head_is_enough() -> None:
    ruinous, free = losing(20, 40, 50, 60), losing(0, 0, 0, 0)
    assert used([0.5], [[ruinous], [free]]) == {0}


level = st.tuples(
    st.floats(0.05, 1.2), st.lists(st.floats(0, 10), min_size=4, max_size=4).map(sorted)
)


@given(st.lists(level, max_size=5))
def test_no_other_level_makes_a_run_shorter(levels: list[tuple[float, list[float]]]) -> None:
    costs = [cost for cost, _ in levels]
    losses = [losing(*lost) for _, lost in levels]
    found = used(costs, [losses])
    assert len(found) <= len(BOUNDS)
    for cost, lost in zip(costs, losses, strict=True):
        if lost[-1][1] > BOUNDS[0] or cost > 1 - LEAST_SAVED:
            continue
        # All samples may run there whatever the bound, so something as cheap stays.
        cheapest = min((costs[index] for index in found), default=1.0)
        assert cheapest <= cost or any(
            1 - share * (1 - costs[index]) <= cost + 1e-9
            for index in found
            for share in [1.0, *SHARES]
        )


@pytest.mark.parametrize("bound", BOUNDS)
def test_a_level_without_loss_is_used_whatever_the_bound(bound: float) -> None:
    assert used([0.5, 0.9], [[losing(0, 0, 0, 0), losing(0, 0, 0, bound)]]) == {0}
