from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from networks import ConvNet, pruned

from pbc.bundle.ladder import INT8
from pbc.ir.levels import LevelGraphs
from pbc.ir.program import Program
from pbc.proxies import halving
from pbc.proxies.halving import FIRST, LAST, LEFT_BY_THE_REST, WHOLE, worth_the_rest
from pbc.testing import rungs

Losses = list[tuple[float, float]]
FREE: Losses = [(0.25, 0.0), (1.0, 0.1)]
RUINOUS: Losses = [(0.25, 20.0), (1.0, 60.0)]


def of_costs(*costs: float) -> Program:
    program = pruned(ConvNet, levels=len(costs))
    proxies = (
        replace(level, cost=cost) for level, cost in zip(program.levels[1:], costs, strict=True)
    )
    return replace(program, levels=(program.levels[0], *proxies))


def judge(monkeypatch: pytest.MonkeyPatch, found: list[Losses] | None) -> list[LevelGraphs]:
    """Have levels lose so much; returns a list of those that will be judged."""
    judged: list[LevelGraphs] = []

    def losses(program: Program, levels: Sequence[LevelGraphs], *_: object) -> list[Losses] | None:
        judged.extend(levels)
        return found

    monkeypatch.setattr(halving, "losses_by_share", losses)
    return judged


@given(st.integers(0, 5000))
def test_two_rounds_have_the_steps_of_the_whole(steps: int) -> None:
    first, last = FIRST.steps(steps), LAST.steps(steps)
    assert first is not None
    assert last is not None
    assert first + last == WHOLE.steps(steps) == steps
    assert FIRST.seed != LAST.seed


def test_levels_that_no_run_would_use_go_with_a_note(monkeypatch: pytest.MonkeyPatch) -> None:
    judge(monkeypatch, [RUINOUS, FREE, RUINOUS])
    before = of_costs(0.9, 0.6, 0.3)
    after = worth_the_rest(before, [1, 2, 3])
    assert [level.cost for level in rungs(after).levels] == [1.0, 0.6]
    assert after.levels[1].keep == before.levels[2].keep
    assert [note.partition(" (")[2] for note in after.notes[-2:]] == [
        f"cost {cost}, 60.0 points lost after a quarter of its alignment)"
        for cost in ("0.90", "0.30")
    ]


def test_what_the_rest_still_gains_is_expected(monkeypatch: pytest.MonkeyPatch) -> None:
    """At 2 points of 3.5, four of seven samples at a cost of 0.3 save what all do at 0.6."""
    for lost, kept in ((3.4, [1.0, 0.6, 0.3]), (3.6, [1.0, 0.6])):
        judge(monkeypatch, [FREE, [(1.0, lost / LEFT_BY_THE_REST)]])
        after = worth_the_rest(of_costs(0.6, 0.3), [1, 2])
        assert [level.cost for level in after.levels] == kept


def test_a_precision_alone_is_not_judged_and_has_to_be_beaten(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    program = of_costs(0.4, 0.35)
    rounded = replace(program.levels[1], keep={}, precision=INT8)
    narrow = replace(program.levels[2], precision=INT8)
    program = replace(program, levels=(program.levels[0], rounded, narrow))
    judged = judge(monkeypatch, [[(0.25, 4.0), (1.0, 9.0)]])
    after = worth_the_rest(program, [2])
    assert after.levels == program.levels[:2]
    assert [level.precision for level in judged] == ["float32"]  # rounding is still to come
    judge(monkeypatch, [FREE])
    assert worth_the_rest(program, [2]).levels == program.levels


def test_where_images_are_too_few_to_tell_all_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    judge(monkeypatch, None)
    program = of_costs(0.6, 0.3)
    assert worth_the_rest(program, [1, 2]) is program
