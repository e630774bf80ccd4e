"""The cost-model scheduler's decisions: levels, skipped samples, what a time budget buys."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pbc import plugins
from pbc.runtime.costs import Costs, LevelCost
from pbc.runtime.schedulers import Batch, Fallback, Scheduler, SchedulerInput
from pbc.runtime.schedulers.cost_model import HARD_SKIPPING, USUAL_SKIPPING, CostModel
from pbc.runtime.schedulers.estimate import NEVER, Skipping, Workload, cheapest, full_epochs, visits


def costs(*prefix_ms: float, body_ms: float = 0.2, gather_ms: float = 0.0) -> Costs:
    levels = tuple(LevelCost(ms, 8, body_ms / 2, body_ms / 2, True) for ms in prefix_ms)
    return Costs(levels, 0.0, gather_ms, 0.0)


def setting(count: int = 40, **changes: Any) -> SchedulerInput:
    fields: dict[str, Any] = {
        "levels": np.zeros(count, np.int64),
        "allowed": np.ones((count, 3), bool),
        "batch": 4,
        "seed": 0,
        "alpha": None,
        "grouped": False,
        "epochs": 12,
        "costs": costs(1.0, 0.7, 0.5),
    }
    return SchedulerInput(**{**fields, **changes})


def run(scheduler: Scheduler, losses: np.ndarray, epochs: int) -> list[np.ndarray]:
    """Return who was visited in each epoch, as bool[epochs][n]."""
    visited = []
    for epoch in range(epochs):
        seen = np.zeros(len(losses), bool)
        for batch in scheduler.plan(epoch):
            assert not seen[batch.samples].any()
            seen[batch.samples] = True
            assert scheduler.observe(batch, losses[batch.samples])
        scheduler.finish_epoch()
        visited.append(seen)
    return visited


# ---- levels --------------------------------------------------------------------------------


def test_the_level_of_lowest_measured_cost_serves_whatever_its_number() -> None:
    scheduler = CostModel(setting(costs=costs(1.0, 0.4, 0.7)))
    assert set(scheduler.levels.tolist()) == {1}


def test_level_0_serves_where_nothing_is_cheaper_or_allowed() -> None:
    assert set(CostModel(setting(costs=costs(1.0, 1.1, 1.2))).levels.tolist()) == {0}
    allowed = np.ones((40, 3), bool)
    allowed[::2, 1:] = False
    assert CostModel(setting(allowed=allowed)).levels.tolist() == [0, 2] * 20


def test_a_proxy_that_saves_next_to_nothing_is_not_worth_its_difference() -> None:
    allowed = np.ones((1, 2), bool)
    assert cheapest(allowed, np.array([[1.0, 0.98]])).tolist() == [0]
    assert cheapest(allowed, np.array([[1.0, 0.9]])).tolist() == [1]


@pytest.mark.parametrize("grouped", [False, True])
def test_where_features_are_cached_the_body_counts_at_every_visit(grouped: bool) -> None:
    body = LevelCost(1.0, 8, 0.2, 0.2, True), LevelCost(1.5, 8, 0.1, 0.1, True)
    cached = np.arange(40) < 20
    # Level 1 costs 0.5 more to compute and 0.2 less to visit: cached, that pays in three visits.
    for epochs, level in ((2, 0), (12, 1)):
        scheduler = CostModel(
            setting(
                allowed=np.ones((40, 2), bool), costs=Costs(body, 0.0, 0.0, 0.0), cached=cached,
                epochs=epochs, grouped=grouped, skips_samples=False,
            )
        )  # fmt: skip
        assert scheduler.levels.tolist() == [level] * 20 + [0] * 20
        for batch in scheduler.plan(0):
            levels = scheduler.levels[batch.samples]
            assert not grouped or (levels == batch.level).all()


@given(st.data())
def test_nobody_runs_where_it_is_not_allowed(data: st.DataObject) -> None:
    count = data.draw(st.integers(1, 30))
    rows = st.lists(st.booleans(), min_size=2, max_size=2)
    allowed = np.array([[True, *data.draw(rows)] for _ in range(count)])
    prices = costs(*data.draw(st.lists(st.floats(0.1, 2), min_size=3, max_size=3)))
    grouped = data.draw(st.booleans())
    scheduler = CostModel(setting(count, allowed=allowed, costs=prices, grouped=grouped))
    seen: list[int] = []
    plan = scheduler.plan(0)
    for batch in plan:
        seen += batch.samples.tolist()
        levels = scheduler.levels[batch.samples] if not grouped else batch.level
        assert allowed[batch.samples, levels].all()
    assert sorted(seen) == list(range(count))
    assert [len(batch.samples) < 4 for batch in plan].count(True) == (count % 4 > 0)


def test_mixed_batches_come_in_the_order_of_plain_training() -> None:
    orders = []
    for levels in (costs(1.0, 0.7, 0.5), costs(1.0, 1.1, 1.2)):
        plan = CostModel(setting(costs=levels)).plan(3)
        orders.append(np.concatenate([batch.samples for batch in plan]).tolist())
    assert orders[0] == orders[1]
    assert sorted(orders[0]) == list(range(40))
    assert CostModel(setting(seed=1)).plan(3)[0].samples.tolist() != orders[0][:4]


# ---- skipping ------------------------------------------------------------------------------


LOSSES = np.concatenate([np.full(300, 0.1), np.full(100, 2.0)])


def test_easy_samples_rest_hard_ones_never_and_nobody_starves() -> None:
    scheduler = CostModel(setting(400, allowed=np.ones((400, 3), bool)))
    assert scheduler.skipping == USUAL_SKIPPING
    visited = np.array(run(scheduler, LOSSES, 12))
    assert visited[0].all()
    assert visited[10:].all()  # the last 15 % of 12 epochs
    assert visited[:, 300:].all()
    shares = visited[1:10, :300].mean(axis=1)
    assert 0.25 < shares.mean() < 0.6
    for first in range(1, 10):
        assert visited[first : first + 3].any(axis=0).all()


def test_without_skip_or_where_it_does_not_pay_nobody_rests() -> None:
    for changes in (
        {"skips_samples": False},
        # All is cached and the body is cheap: a visit saved is next to nothing.
        {"cached": np.ones(400, bool), "costs": costs(1.0, 0.7, 0.5, body_ms=0.0001)},
    ):
        given_setting = setting(400, allowed=np.ones((400, 3), bool), **changes)
        scheduler = CostModel(given_setting)
        assert scheduler.skipping == NEVER
        assert all(seen.all() for seen in run(scheduler, LOSSES, 12))


def test_an_untold_sample_is_visited() -> None:
    scheduler = CostModel(setting(400, allowed=np.ones((400, 3), bool)))
    scheduler.plan(0)
    scheduler.observe(Batch(0, np.arange(100)), np.zeros(100))
    scheduler.observe(Batch(0, np.arange(100, 200)), np.ones(100))
    scheduler.finish_epoch()
    visited = np.concatenate([batch.samples for batch in scheduler.plan(1)])
    assert set(range(100, 400)) <= set(visited.tolist())
    assert len(visited) < 400


def test_what_is_told_within_an_epoch_does_not_change_its_plan() -> None:
    scheduler = CostModel(setting(400, allowed=np.ones((400, 3), bool)))
    run(scheduler, LOSSES, 2)
    before = [batch.samples.tolist() for batch in scheduler.plan(2)]
    scheduler.observe(Batch(0, np.arange(400)), LOSSES[::-1])
    assert [batch.samples.tolist() for batch in scheduler.plan(2)] == before


@pytest.mark.parametrize("told", [0, 7])
def test_the_state_carries_on_also_in_the_middle_of_an_epoch(told: int) -> None:
    one = CostModel(setting(400, allowed=np.ones((400, 3), bool)))
    run(one, LOSSES, 3)
    plan = one.plan(3)
    for batch in plan[:told]:
        one.observe(batch, LOSSES[batch.samples])
    two: Scheduler = plugins.load("pbc.schedulers", "cost-model")(
        setting(400, allowed=np.ones((400, 3), bool))
    )
    two.load_state(one.state())
    resumed = two.plan(3)
    for a, b in zip(plan, resumed, strict=True):
        assert a.samples.tolist() == b.samples.tolist()
    for batch in plan[told:]:
        one.observe(batch, LOSSES[batch.samples])
        two.observe(batch, LOSSES[batch.samples])
    one.finish_epoch()
    two.finish_epoch()
    for a, b in zip(one.plan(4), two.plan(4), strict=True):
        assert a.samples.tolist() == b.samples.tolist()


# ---- estimates and budgets -----------------------------------------------------------------


def test_expected_visits_match_what_happens() -> None:
    share = np.array([0.65, 0.35])
    losses = np.repeat([0.1, 2.0], (1000 * share).astype(int))
    for skipping in (USUAL_SKIPPING, HARD_SKIPPING):
        scheduler = CostModel(setting(1000, allowed=np.ones((1000, 3), bool)))
        scheduler.skipping = skipping
        happened = np.array(run(scheduler, losses, 12)).sum() / 1000
        assert visits(12, skipping) == pytest.approx(happened, rel=0.05)
    assert visits(12, NEVER) == 12
    assert visits(1, USUAL_SKIPPING) == 1
    assert full_epochs(12) == 2


def test_a_cached_sample_costs_its_features_once() -> None:
    levels = np.array([0, 1])
    prices = costs(1.0, 0.5, body_ms=0.2, gather_ms=0.1)
    load = Workload(prices, np.array([True, False]))
    assert load.run_ms(levels, 10, NEVER) == pytest.approx((1.0 + 10 * 0.3) + 10 * 0.7)
    twice = Workload(prices, np.array([True, True]), views=2)
    assert twice.run_ms(levels, 10, NEVER) == pytest.approx(2 * 1.5 + 2 * 10 * 0.3)


FALLBACKS = (Fallback(np.ones((40, 3), bool), 0.8, 2.5),)
STRICT = np.array([[True, True, False]] * 40)


def chosen_within(budget_ms: float, **changes: Any) -> CostModel:
    return CostModel(
        setting(allowed=STRICT, fallbacks=FALLBACKS, time_budget_ms=budget_ms, **changes)
    )


def run_ms(level: int, epochs: int, skipping: Skipping) -> float:
    load = Workload(costs(1.0, 0.7, 0.5), np.zeros(40, bool))
    return load.run_ms(np.full(40, level), epochs, skipping)


def test_a_budget_is_met_by_rest_then_by_levels_then_by_epochs() -> None:
    enough = chosen_within(run_ms(1, 12, USUAL_SKIPPING))
    assert (enough.skipping, enough.levels[0], enough.epochs) == (USUAL_SKIPPING, 1, 12)
    assert enough.notes == ()
    tighter = chosen_within(run_ms(1, 12, HARD_SKIPPING))
    assert (tighter.skipping, tighter.levels[0], tighter.epochs) == (HARD_SKIPPING, 1, 12)
    cheaper = chosen_within(run_ms(2, 12, HARD_SKIPPING))
    assert (cheaper.skipping, cheaper.levels[0], cheaper.epochs) == (HARD_SKIPPING, 2, 12)
    assert cheaper.notes == (
        "the time budget needs levels of fidelity 0.8, below the floor: "
        "a loss of 2.5 points of accuracy is predicted",
    )
    fewer = chosen_within(run_ms(2, 5, HARD_SKIPPING))
    assert (fewer.levels[0], fewer.epochs) == (2, 5)
    assert fewer.notes[1:] == ("the time budget is enough for 5 of 12 epochs",)
    assert chosen_within(1e-9).epochs == 1


def test_without_skip_a_budget_does_not_make_anybody_rest() -> None:
    assert chosen_within(run_ms(2, 12, NEVER), skips_samples=False).skipping == NEVER


def test_an_unknown_loss_is_told_as_such() -> None:
    unknown = (Fallback(np.ones((40, 3), bool), 0.8, None),)
    scheduler = CostModel(
        setting(allowed=STRICT, fallbacks=unknown, time_budget_ms=run_ms(2, 12, HARD_SKIPPING))
    )
    assert "an unknown loss of accuracy is predicted" in scheduler.notes[0]


def test_the_level_of_a_remainder_is_allowed_to_all_of_it() -> None:
    allowed = np.ones((6, 3), bool)
    allowed[:3, 2] = False  # three at level 1, three at level 2: neither fills a batch
    scheduler = CostModel(setting(6, allowed=allowed, grouped=True))
    assert scheduler.levels.tolist() == [1, 1, 1, 2, 2, 2]
    plan: Sequence[Batch] = scheduler.plan(0)
    assert sorted(len(batch.samples) for batch in plan) == [2, 4]
    assert {batch.level for batch in plan} == {1}
