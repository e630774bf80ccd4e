"""Who may run where: the cheapest level that a sample tolerates, and never one below the floor."""

from __future__ import annotations

import numpy as np

from pbc.bundle.ladder import Ladder, Level
from pbc.runtime.routing.predictions import means
from pbc.runtime.routing.routes import routable, route


def ladder(*fidelities: float | None) -> Ladder:
    original = Level(0, 1.0, None, 1.0, 1.0, "original")
    proxies = (Level(k, 0.5, None, 0.5, f, "aligned") for k, f in enumerate(fidelities, 1))
    return Ladder((original, *proxies))


def test_a_sample_goes_to_the_cheapest_level_it_tolerates() -> None:
    predicted = np.array([[0.99, 0.95], [0.95, 0.5], [0.5, 0.2], [0.5, 0.95]], np.float32)
    routing = route(predicted, routable(ladder(0.97, 0.93), 0.9), 0.9)
    assert routing.levels.tolist() == [2, 1, 0, 2]
    assert routing.allowed.tolist() == [
        [True, True, True],
        [True, True, False],
        [True, False, False],
        [True, False, True],
    ]


def test_a_level_below_the_floor_or_unaligned_is_never_used() -> None:
    sure = np.ones((3, 3), np.float32)
    for fidelities, expected in (((0.97, None, 0.85), 1), ((None, None, 0.85), 0)):
        usable = routable(ladder(*fidelities), 0.9)
        assert route(sure, usable, 0.9).levels.tolist() == [expected] * 3
    assert routable(ladder(0.97, None, 0.85), 0.9).tolist() == [True, True, False, False]


def test_no_level_is_cheaper_than_the_cheapest_allowed() -> None:
    assert routable(ladder(0.97, 0.96, 0.95), 0.9, 2).tolist() == [True, True, True, False]
    assert routable(ladder(0.97, 0.96, 0.95), 0.9, 0).tolist() == [True, False, False, False]


def test_a_prediction_that_is_no_number_routes_nowhere() -> None:
    unknown = np.full((2, 2), np.nan, np.float32)
    assert route(unknown, np.ones(3, bool), 0.9).levels.tolist() == [0, 0]


def test_without_a_policy_everybody_has_the_ladder_s_fidelity() -> None:
    assert means(ladder(0.97, None), 2).tolist() == [[0.97, 0.0]] * 2
