"""Who runs with whom, and who learns: the piebridge scheduler."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pbc import plugins
from pbc.runtime.schedulers import Batch, Scheduler, SchedulerInput
from pbc.runtime.schedulers.piebridge import EMA_WEIGHT, PieBridge, group


def setting(levels: list[int], **changes: Any) -> SchedulerInput:
    count = max(levels, default=0) + 2
    fields: dict[str, Any] = {
        "levels": np.array(levels, np.int64),
        "allowed": np.ones((len(levels), count), bool),
        "batch": 4,
        "seed": 0,
        "alpha": 0.8,
        "grouped": True,
    }
    return SchedulerInput(**{**fields, **changes})


def tell(scheduler: Scheduler, batch: Batch, loss: float) -> bool:
    """Tell a batch's loss, the same for all its samples."""
    return scheduler.observe(batch, np.full(len(batch.samples), loss))


# ---- grouping ------------------------------------------------------------------------------

levels_of_samples = st.lists(st.integers(0, 5), min_size=1, max_size=80)
batch_sizes = st.integers(1, 9)


@given(levels_of_samples, batch_sizes)
def test_every_sample_is_in_exactly_one_batch(levels: list[int], batch: int) -> None:
    full, short = group(np.array(levels), batch)
    visited = np.concatenate([members for _, members in full + short])
    assert sorted(visited.tolist()) == list(range(len(levels)))


@given(levels_of_samples, batch_sizes)
def test_only_one_batch_is_short(levels: list[int], batch: int) -> None:
    full, short = group(np.array(levels), batch)
    assert all(len(members) == batch for _, members in full)
    assert [len(members) for _, members in short] == [len(levels) % batch] * bool(
        len(levels) % batch
    )


@given(levels_of_samples, batch_sizes)
def test_nobody_runs_at_a_cheaper_level_than_its_own(levels: list[int], batch: int) -> None:
    full, short = group(np.array(levels), batch)
    for level, members in full + short:
        own = [levels[at] for at in members]
        assert level == min(own)


@given(levels_of_samples, batch_sizes)
def test_a_remainder_joins_the_next_more_expensive_level(levels: list[int], batch: int) -> None:
    """Fewer than a batch of each level move on, and no sample passes a level that fills one."""
    full, short = group(np.array(levels), batch)
    for present in set(levels):
        moved = [
            at
            for level, members in full + short
            for at in members
            if levels[at] == present and level < present
        ]
        assert len(moved) < batch
    for level, members in full + short:
        between = {levels[at] for at in members}
        skipped = [p for p in set(levels) if level < p < max(between) and p not in between]
        assert not skipped


def test_grouping_by_example() -> None:
    full, short = group(np.array([2, 0, 2, 1, 2, 0, 2, 2]), 2)
    assert [(level, members.tolist()) for level, members in full] == [
        (2, [0, 2]),
        (2, [4, 6]),
        (1, [7, 3]),
        (0, [1, 5]),
    ]
    assert short == []


def test_one_level_short_of_a_batch_stays_there() -> None:
    full, short = group(np.array([3, 3, 3]), 8)
    assert full == []
    assert [(level, members.tolist()) for level, members in short] == [(3, [0, 1, 2])]


# ---- the scheduler -------------------------------------------------------------------------


@given(levels_of_samples, batch_sizes, st.integers(0, 3), st.booleans())
def test_a_plan_visits_everyone_and_ends_with_the_short_batch(
    levels: list[int], batch: int, epoch: int, grouped: bool
) -> None:
    scheduler = PieBridge(setting(levels, batch=batch, grouped=grouped))
    plan = scheduler.plan(epoch)
    assert sorted(np.concatenate([b.samples for b in plan]).tolist()) == list(range(len(levels)))
    assert all(len(b.samples) == batch for b in plan[:-1])
    if not grouped:
        assert {b.level for b in plan} == {0}


def test_plans_are_repeatable_and_differ_by_seed_and_epoch() -> None:
    def flat(plan: list[Batch]) -> list[int]:
        return [int(at) for batch in plan for at in batch.samples]

    levels = [at % 3 for at in range(40)]
    one, two = PieBridge(setting(levels)), PieBridge(setting(levels))
    assert flat(one.plan(0)) == flat(two.plan(0))
    assert flat(one.plan(0)) != flat(one.plan(1))
    assert flat(one.plan(0)) != flat(PieBridge(setting(levels, seed=1)).plan(0))
    assert [b.level for b in one.plan(0)] != sorted(b.level for b in one.plan(0))


def test_a_loss_below_alpha_times_the_mean_skips_its_backward() -> None:
    scheduler = PieBridge(setting([0] * 8))
    batch = Batch(0, np.arange(4))
    assert tell(scheduler, batch, 2.0)
    assert tell(scheduler, batch, 1.61)
    mean = EMA_WEIGHT * 1.61 + (1 - EMA_WEIGHT) * 2.0
    assert not tell(scheduler, batch, 0.8 * mean)
    assert scheduler.state()["ema"][0] == pytest.approx(
        EMA_WEIGHT * 0.8 * mean + (1 - EMA_WEIGHT) * mean
    )


def test_nothing_is_skipped_without_alpha() -> None:
    scheduler = PieBridge(setting([0] * 8, alpha=None))
    assert all(tell(scheduler, Batch(0, np.arange(4)), loss) for loss in (2.0, 0.1, 0.0))


def test_skipped_samples_move_one_level_cheaper_in_the_next_epoch_where_allowed() -> None:
    allowed = np.array([[1, 1, 1], [1, 0, 1], [1, 1, 0], [1, 1, 1]], bool)
    scheduler = PieBridge(setting([1, 0, 1, 2], allowed=allowed))
    tell(scheduler, Batch(0, np.array([0])), 1.0)
    assert not tell(scheduler, Batch(0, np.arange(4)), 0.1)
    assert scheduler.levels.tolist() == [1, 0, 1, 2]
    scheduler.finish_epoch()
    assert scheduler.levels.tolist() == [2, 0, 1, 2]
    scheduler.finish_epoch()
    assert scheduler.levels.tolist() == [2, 0, 1, 2]


def test_the_setting_is_left_alone() -> None:
    given = setting([0, 0])
    scheduler = PieBridge(given)
    tell(scheduler, Batch(0, np.arange(2)), 1.0)
    tell(scheduler, Batch(0, np.arange(2)), 0.1)
    scheduler.finish_epoch()
    assert scheduler.levels.tolist() == [1, 1]
    assert given.levels.tolist() == [0, 0]


def test_the_state_carries_on() -> None:
    batches = [Batch(0, np.arange(at, at + 2)) for at in (0, 2, 4)]
    losses = [1.0, 0.3, 0.9, 0.2, 0.7, 0.1]
    one: Scheduler = PieBridge(setting([0] * 6))
    for loss, batch in zip(losses[:3], batches, strict=True):
        tell(one, batch, loss)
    two: Scheduler = plugins.load("pbc.schedulers", "piebridge")(setting([0] * 6))
    two.load_state(one.state())
    for loss, batch in zip(losses[3:], batches, strict=True):
        assert tell(one, batch, loss) == tell(two, batch, loss)
    one.finish_epoch()
    two.finish_epoch()
    assert one.levels.tolist() == two.levels.tolist()
    assert one.state()["ema"].tolist() == two.state()["ema"].tolist()
